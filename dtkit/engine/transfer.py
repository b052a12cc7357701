"""Carrying objects between this rank and the driver."""

from __future__ import annotations

from typing import Any

import cloudpickle
import torch

from dtkit.engine.shell import current_shell

__all__ = ["accept", "export"]

# Any: the user's own objects.


def export(name: str) -> bytes:
    """Return the object called `name`, pickled; classes defined in cells go along by value.

    A name may have attributes: `model.head`. Tensors, and modules with all
    their tensors, are pickled on the CPU; the rank's own object is unchanged.

    Raises:
        NameError: there is no such name.
        TypeError: it cannot be pickled.
    """
    value = _lookup(name)
    try:
        with _tensors_to_cpu():
            return cloudpickle.dumps(value)  # type: ignore[no-any-return]
    except Exception as error:
        msg = f"{name} ({type(value).__name__}) cannot be carried: {error}"
        raise TypeError(msg) from error


def accept(name: str, payload: bytes) -> None:
    """Put a pickled object into the namespace under `name`."""
    current_shell().user_ns[name] = cloudpickle.loads(payload)


def _lookup(name: str) -> Any:
    first, *rest = name.split(".")
    namespace = current_shell().user_ns
    if first not in namespace:
        msg = f"no {first!r} on this rank; names live there after a cell has made them"
        raise NameError(msg)
    value = namespace[first]
    for attribute in rest:
        value = getattr(value, attribute)
    return value


def _tensors_to_cpu() -> Any:
    """Return a context in which pickling a tensor on a GPU pickles its copy on the CPU."""
    from dtkit.engine.patches import replaced

    def make(original: Any) -> Any:
        def __reduce_ex__(self: torch.Tensor, protocol: Any) -> Any:  # noqa: N807
            if self.device.type == "cpu":
                return original(self, protocol)
            moved = self.detach().cpu()
            if isinstance(self, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, requires_grad=self.requires_grad)
            return original(moved, protocol)

        return __reduce_ex__

    return replaced(torch.Tensor, "__reduce_ex__", make)
