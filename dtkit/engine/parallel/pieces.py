"""A model that several ranks hold together, as the plain one that it is a part of."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtkit.chunks import Chunk, Whole
from dtkit.engine.parallel.attention import DividedAttention
from dtkit.engine.parallel.layout import MARK
from dtkit.engine.parallel.regions import InRegion
from dtkit.engine.parallel.styles import FusedLinear, is_fused, stripes
from dtkit.packing import blank, outside, same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PIECE", "Pieces", "plain_class", "strip"]

# Any, below: the user's own objects, and what pickle makes of them.

PIECE = "_dtkit_piece"
"""Attribute of tensors that lie on one rank of several, and on the others have no memory."""
_ADDED = (
    "_fsdp", "_is_fsdp", "__composable_api", "_distribute_module", "_dtkit_mesh", "_dtkit_converts",
    "_dtkit_guarded",
)  # fmt: skip
"""What attributes begin with that were put into a module to hold it over several ranks."""
_OURS = ("torch.distributed.", "dtkit.engine.parallel.")

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    DividedAttention: nn.MultiheadAttention,
    FusedLinear: nn.Linear,
}
"""What modules were whose class is of ours now."""


class Pieces:
    """Takes an object's tensors apart, as `pack` comes upon them.

    Attributes:
        wholes: the tensors that other ranks have parts of, too.
        chunks: the parts that are here.
        parts: their tensors.
        ranks: who holds parts.
    """

    def __init__(self) -> None:
        self.wholes: list[Whole] = []
        self.chunks: list[Chunk] = []
        self.parts: list[torch.Tensor] = []
        self.ranks: set[int] = set()

    def reduce(self, obj: Any) -> Any:
        """Return how an object is pickled, None if it is none of ours."""
        if isinstance(obj, DTensor):
            return outside(self._add(obj))
        if isinstance(obj, torch.Tensor) and PIECE in obj.__dict__:
            parts = [] if obj.is_meta else [((0,) * obj.dim(), obj)]
            return outside(self._note(obj, parts))
        held = getattr(type(obj), "dtkit_model", None)
        if held is not None:
            return same, (obj.model,)
        if isinstance(obj, nn.Module) and _is_changed(obj):
            if MARK in obj.__dict__:
                self.ranks.update(obj.__dict__[MARK].mesh.mesh.flatten().tolist())
            return _plain(obj)
        return None

    def _add(self, tensor: DTensor) -> int:
        if any(isinstance(placement, Partial) for placement in tensor.placements):
            msg = "a DTensor that is a partial sum; redistribute() it first"
            raise TypeError(msg)
        self.ranks.update(tensor.device_mesh.mesh.flatten().tolist())
        if is_fused(tensor):
            return self._note(tensor, stripes(tensor))
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return self._note(tensor, [(offset, tensor.to_local())])

    def _note(
        self, tensor: torch.Tensor, parts: Sequence[tuple[tuple[int, ...], torch.Tensor]]
    ) -> int:
        number = len(self.wholes)
        self.wholes.append(
            Whole(
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                tensor.numel() * tensor.element_size(),
                tensor.requires_grad,
                isinstance(tensor, nn.Parameter),
            )
        )
        for offset, part in parts:
            if part.numel():
                self.chunks.append(Chunk(number, offset, tuple(part.shape)))
                self.parts.append(part.detach())
        return number


def _is_changed(module: nn.Module) -> bool:
    return (
        isinstance(module, FSDPModule | InRegion)
        or type(module) in _CLASSES
        or MARK in module.__dict__
        or any(_our_hooks(hooks) for hooks in _hooks_of(module.__dict__).values())
    )


def _plain(module: nn.Module) -> Any:
    """Return how a module is pickled so that it comes back as one of its own class."""
    kind = plain_class(module)
    state = module.__getstate__()
    strip(state)
    state.pop(MARK, None)
    return blank, (kind,), state


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has when it is not divided."""
    kind = type(module)
    if isinstance(module, FSDPModule | InRegion):  # [a class of its name, one of these, its own, …]
        kind = kind.__mro__[2]
    return _CLASSES.get(kind, kind)


def strip(state: dict[str, Any]) -> None:
    """Take out of a module's state what was put into it to hold it over several ranks."""
    for name in [n for n in state if n.startswith(_ADDED)]:
        del state[name]
    removed: set[int] = set()
    for hooks in _hooks_of(state).values():
        removed.update(_our_hooks(hooks))
    for name, hooks in _hooks_of(state).items():
        state[name] = type(hooks)((k, v) for k, v in hooks.items() if k not in removed)


def _hooks_of(state: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Return the dictionaries of a module's state that hold hooks, or say how they are called."""
    return {
        name: value for name, value in state.items()
        if "_hooks" in name and isinstance(value, dict) and value
    }  # fmt: skip


def _our_hooks(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if _origin(hook).startswith(_OURS)]


def _origin(hook: Callable[..., Any]) -> str:
    while True:
        if isinstance(hook, partial):
            hook = hook.func
        elif hasattr(hook, "hook"):  # torch wraps some
            hook = hook.hook
        else:
            return str(getattr(hook, "__module__", ""))
