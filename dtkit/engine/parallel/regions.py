"""Parts of a model within which tensors are DTensors, and outside of which all are plain.

A plain tensor is one that is whole and alike on the ranks; a DTensor says how it is divided.
Where both meet, the plain one is taken as what it is. So code that was written for one device,
with the whole's sizes, computes the whole's result, whatever it does.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import DistError
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["InRegion", "everywhere", "is_inside", "make_region", "put_on", "whole"]

# Any, throughout: functions of torch, and what they take and return.

_SPLITS = (torch.split, torch.Tensor.split)
_CHUNKS = (torch.chunk, torch.Tensor.chunk)
_DEPTH = threading.local()
_MESH = "_dtkit_mesh"
_SEVERAL = "_dtkit_converts"


class InRegion:
    """A module whose forward pass computes with DTensors; its class is put before the module's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as ever, and return plain tensors."""
        mesh = self.__dict__[_MESH].mesh
        if self.__dict__[_SEVERAL]:
            # Once, and not in each layer: then their gradients are added up before they are sent.
            args, kwargs = tree_map(
                lambda v: put_on(mesh, v) if _is_plain(v) and v.is_floating_point() else v,
                (args, kwargs),
            )
        with _Mixing(mesh):  # a mode of torch's, which is left whatever is raised
            found = super().forward(*args, **kwargs)  # type: ignore[misc]  # the module's own
        return tree_map(whole, found)


def make_region(module: nn.Module, mesh: DeviceMesh, *, has_several: bool) -> None:
    """Make a module a region.

    Args:
        module: it keeps everything but its class, which is a subclass of what it was.
        mesh: the ranks that hold it.
        has_several: whether several divided layers in it take the same tensor.
    """
    kind = type(module)
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (InRegion, kind), about)
    module.__dict__[_MESH] = _Kept(mesh)
    module.__dict__[_SEVERAL] = has_several


class _Kept:
    """Holds a mesh, of which a copied module has the same."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __deepcopy__(self, _memo: object) -> _Kept:
        return self


def put_on(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that every rank has as a DTensor."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def everywhere(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, plain or not, as a DTensor that is whole on every rank."""
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate()])
    return put_on(mesh, tensor)


def whole(value: Any) -> Any:
    """Return a DTensor as a plain tensor, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_inside() -> bool:
    """Return whether this thread is in a region."""
    return getattr(_DEPTH, "value", 0) > 0


class _Mixing(TorchFunctionMode):
    """Lets functions take DTensors and plain tensors together."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __enter__(self) -> Any:
        _DEPTH.value = getattr(_DEPTH, "value", 0) + 1
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's

    def __exit__(self, *args: object) -> None:
        _DEPTH.value -= 1
        super().__exit__(*args)  # type: ignore[no-untyped-call]  # torch's

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        leaves = tree_leaves(given)
        if not any(isinstance(leaf, DTensor) for leaf in leaves):
            return func(*args, **given[1])
        if any(_is_plain(leaf) for leaf in leaves):
            given = tree_map(lambda v: put_on(self._mesh, v) if _is_plain(v) else v, given)
        if func is functional.scaled_dot_product_attention:
            return _attention(*given[0], **given[1])
        if func in _SPLITS or func in _CHUNKS:
            parts = _split_fused(*given[0], **given[1], is_chunk=func in _CHUNKS)
            if parts is not None:
                return parts
        try:
            return func(*given[0], **given[1])
        except (NotImplementedError, RuntimeError) as error:
            # What failed on this rank alone must not be tried again: the others go on.
            if isinstance(error, torch.OutOfMemoryError | DistError) or _changes_in_place(func):
                raise
            # Torch does not know how to divide this. What is wrong with it is raised below, too.
        found = func(*tree_map(whole, given[0]), **tree_map(whole, given[1]))
        return tree_map(lambda v: put_on(self._mesh, v) if _is_plain(v) else v, found)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


def _changes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _split_fused(
    tensor: torch.Tensor, *args: Any, dim: int = 0, is_chunk: bool, **kwargs: Any
) -> tuple[torch.Tensor, ...] | None:
    """Split what a fused layer returned into what was fused, each divided over the ranks.

    None: it is something else, or is split in another way.
    """
    size = args[0] if args else next(iter(kwargs.values()))
    dim = (args[1] if len(args) > 1 else dim) % tensor.dim()
    placement = tensor.placements[0] if isinstance(tensor, DTensor) else None
    if not isinstance(placement, _StridedShard) or placement.dim != dim:
        return None
    num = placement.split_factor
    width = tensor.shape[dim] // num
    wanted = [num] if is_chunk else [width, [width] * num, (width,) * num]
    return tensor.unflatten(dim, (num, width)).unbind(dim) if size in wanted else None


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """Compute attention for the heads that are here; torch cannot divide it on a CPU."""
    kernel: Any = functional.scaled_dot_product_attention
    mesh = next(t.device_mesh for t in (query, key, value) if isinstance(t, DTensor))
    given = [query, key, value]
    places = {tuple(t.placements) for t in given if isinstance(t, DTensor)}
    placement = next(iter(places))[0]
    dim = placement.dim if type(placement) is Shard else -1
    if len(places) > 1 or not 0 <= dim < query.dim() - 2:
        mask = whole(attn_mask)
        return put_on(mesh, kernel(*map(whole, given), mask, *args, **kwargs))
    mask = attn_mask
    if isinstance(mask, DTensor):
        at = mask.dim() - (query.dim() - dim)  # masks are aligned at the last dimension
        is_per_head = at >= 0 and mask.shape[at] > 1
        mask = mask.redistribute(placements=[Shard(at) if is_per_head else Replicate()]).to_local()
    found = kernel(*(t.to_local() for t in given), mask, *args, **kwargs)  # type: ignore[attr-defined]
    return DTensor.from_local(found, mesh, [placement], run_check=False)
