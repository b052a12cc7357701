"""Steps of the cell's optimizers, told from those of the optimizers that they wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import optimizer as optim

    from dtkit.engine.observe import Sink

__all__ = ["Outermost", "found_inf"]

# Any, throughout: arguments of torch's hooks.


class Outermost:
    """Tells a step from the steps of the optimizers that it wraps."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._optimizer: optim.Optimizer | None = None

    def before(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Tell that a step begins, if it is not part of another one."""
        # The same optimizer again: its last step raised and never reached `after`.
        if self._optimizer not in (None, optimizer):
            return None
        self._optimizer = optimizer
        # args[0] is the optimizer itself.
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        closure = self._sink.before_step(optimizer, given)
        return None if closure is given else (args[:1], {**kwargs, "closure": closure})

    def after(self, optimizer: optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Tell that it is over."""
        if self._optimizer is optimizer:
            self._optimizer = None
            if not found_inf(optimizer):
                self._sink.after_step(optimizer)


def found_inf(optimizer: Any) -> bool:
    """Return whether a GradScaler lets an optimizer skip its step."""
    # Fused optimizers are called even when the step is to be skipped, with this
    # attribute set; their hooks run although the parameters stay as they were.
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
