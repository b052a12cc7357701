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
from dtkit.engine.parallel.layout import MARK
from dtkit.packing import blank, outside, same

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PIECE", "Pieces", "plain_class", "strip"]

# Any, below: the user's own objects, and what pickle makes of them.

PIECE = "_dtkit_piece"
"""Attribute of tensors that lie on one rank of several, and on the others have no memory."""
_OURS = ("torch.distributed.", "dtkit.engine.parallel.")


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
            num = 0 if obj.is_meta else obj.numel()
            shape = tuple(obj.shape) if num else (0,) * max(1, obj.dim())
            return outside(self._note(obj, obj, Chunk(len(self.wholes), (0,) * obj.dim(), shape)))
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
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        self.ranks.update(tensor.device_mesh.mesh.flatten().tolist())
        return self._note(tensor, tensor.to_local(), Chunk(len(self.wholes), offset, shape))

    def _note(self, tensor: torch.Tensor, part: torch.Tensor, chunk: Chunk) -> int:
        self.wholes.append(
            Whole(
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                tensor.numel() * tensor.element_size(),
                tensor.requires_grad,
                isinstance(tensor, nn.Parameter),
            )
        )
        if chunk.numel:
            self.chunks.append(chunk)
            self.parts.append(part.detach())
        return chunk.number


def _is_changed(module: nn.Module) -> bool:
    return (
        isinstance(module, FSDPModule)
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
    """Return the class that a module has when it is not sharded."""
    # [its name with FSDP before it, FSDPModule, its own, …]
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def strip(state: dict[str, Any]) -> None:
    """Take out of a module's state what was put into it to hold it over several ranks."""
    for name in [n for n in state if n.startswith(("_fsdp", "_is_fsdp", "__composable_api"))]:
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
