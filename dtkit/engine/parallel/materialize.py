"""Giving weights to a model that was made on torch's meta device, a part at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["materialize", "materialize_own"]


def materialize(unit: nn.Module, device: torch.device) -> None:
    """Give memory and first values to all that is on the meta device still in a unit.

    Values come from the modules' own `reset_parameters`, in the modules' order: for
    torch's modules the same numbers as when they are made one after the other.

    Raises:
        InvalidInputError: a module cannot fill its parameters by itself.
    """
    for module in unit.modules():
        materialize_own(module, device)


def materialize_own(module: nn.Module, device: torch.device) -> None:
    """Do so for what a module has beside its children.

    Raises:
        InvalidInputError: it cannot fill its parameters by itself.
    """
    own = [*module._parameters.values(), *module._buffers.values()]  # noqa: SLF001  not the children's
    if not any(tensor is not None and tensor.is_meta for tensor in own):
        return
    reset: Any = getattr(module, "reset_parameters", None) or getattr(
        module, "_reset_parameters", None
    )
    if reset is None:
        msg = (
            f"{type(module).__name__} was made on the meta device and has no "
            "reset_parameters() to fill its own parameters with: give it one, or make the "
            "model on a real device"
        )
        raise InvalidInputError(msg)
    module.to_empty(device=device, recurse=False)
    reset()
