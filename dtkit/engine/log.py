"""`dtkit.log`: metrics of the cell's own beside the recorded ones."""

from __future__ import annotations

from typing import Any

from dtkit.engine.process.agent import current_run

__all__ = ["log"]


def log(**metrics: Any) -> None:  # Any: a number, or a tensor with one element
    """Record metrics under the current step: `dtkit.log(accuracy=0.9, grad_norm=norm)`.

    They become columns of `Run.history` (mean over ranks) and tiles of the
    dashboard. A value is a number or a one-element tensor; a tensor on a GPU is
    read later, so logging does not wait for the device. Outside a run the call
    does nothing, so that the same code runs as a plain script.

    Raises:
        TypeError: a value is not a number.
    """
    for name, value in metrics.items():
        is_number = isinstance(value, int | float) or (
            hasattr(value, "detach") and value.numel() == 1
        )
        if not is_number and not hasattr(value, "__float__"):
            msg = f"dtkit.log({name}=…): {type(value).__name__} is not a number"
            raise TypeError(msg)
    run = current_run()
    if run is not None:
        run.recorder.log(
            {k: v.detach() if hasattr(v, "detach") else float(v) for k, v in metrics.items()}
        )
