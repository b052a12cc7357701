"""Parameters, optimizer state and any objects, from one rank to all or from all to all."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch

from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.moving import allgather, broadcast_, broadcast_async_

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
]


def broadcast_parameters(
    params: dict[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    root_rank: int,
    prefix: str = "",
) -> None:
    """Overwrite tensors with the root's.

    Args:
        params: a `state_dict()`, or a list such as that of `named_parameters()`.
        root_rank: whose tensors count.
        prefix: before their names, to tell models apart.

    Raises:
        ValueError: `params` is neither.
    """
    if isinstance(params, dict):
        named = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        # A list, or what model.named_parameters() returns.
        named = [p if isinstance(p, tuple) else ("", p) for p in params]
    else:
        msg = f"broadcast_parameters takes a dict or a list, not {type(params).__name__}"
        raise ValueError(msg)  # noqa: TRY004  Horovod's exception
    handles = [
        broadcast_async_(tensor, root_rank, f"{prefix}{name or number}")
        for number, (name, tensor) in enumerate(named)
        if isinstance(tensor, torch.Tensor)
    ]
    for handle in handles:
        handle.wait()


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Overwrite an optimizer's state and options with the root's.

    State that a rank lacks, before its first step, is made. An optimizer that has
    none is left with zero gradients, as by Horovod. `model` is not needed and
    taken for Horovod's sake.

    Raises:
        ValueError: an LBFGS, whose state is no tensors.
    """
    del model
    if isinstance(optimizer, torch.optim.LBFGS):
        msg = "the state of LBFGS cannot be broadcast: its entries differ in number by rank"
        raise ValueError(msg)  # noqa: TRY004  Horovod's exception
    if not optimizer.state:
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
    mine = optimizer.state_dict()
    layout = broadcast_object(_without_tensors(mine), root_rank, "optimizer.layout")
    tensors = dict(_tensors_in(mine))
    found: dict[tuple[Any, ...], torch.Tensor] = {}
    handles = []
    for path, shape, dtype in layout["tensors"]:
        tensor = tensors.get(path)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            tensor = torch.zeros(shape, dtype=dtype, device=_device_of(optimizer, path))
        else:
            tensor = tensor.clone()
        found[path] = tensor
        name = ".".join(map(str, path))
        handles.append(broadcast_async_(tensor, root_rank, f"optimizer.{name}"))
    for handle in handles:
        handle.wait()
    optimizer.load_state_dict(_filled(layout["rest"], found, ()))


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the root's object; what the others pass does not matter."""
    from dtkit.horovod.torch.basics import rank

    data = _to_bytes(obj) if rank() == root_rank else torch.empty(0, dtype=torch.uint8)
    name = None if name is None else f"object.{name}"
    size = torch.tensor([data.numel()], dtype=torch.int64)
    broadcast_(size, root_rank, name and f"{name}.size", process_set)
    if rank() == root_rank:
        broadcast_(data, root_rank, name and f"{name}.data", process_set)
        return obj
    data = torch.empty(int(size), dtype=torch.uint8)
    broadcast_(data, root_rank, name and f"{name}.data", process_set)
    return _from_bytes(data)


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return the objects of all ranks, in the order of the ranks."""
    data = _to_bytes(obj)
    sizes = allgather(torch.tensor([data.numel()]), name and f"{name}.size", process_set).tolist()
    everyones = allgather(data, name and f"{name}.data", process_set)
    return [_from_bytes(part) for part in everyones.split(sizes)]


def _to_bytes(obj: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(cloudpickle.dumps(obj)), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    # Between the ranks of one job, which run the same code as the same user.
    return cloudpickle.load(io.BytesIO(data.numpy().tobytes()))


def _device_of(optimizer: torch.optim.Optimizer, path: tuple[Any, ...]) -> torch.device:
    """Return where the state of the parameter with the number in `path` belongs."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = path[1] if path[0] == "state" else 0
    return params[number].device if path[-1] != "step" else torch.device("cpu")


def _tensors_in(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors_in(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _tensors_in(inner, (*path, key))


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    tensors = [(path, tuple(t.shape), t.dtype) for path, t in _tensors_in(state)]
    return {"tensors": tensors, "rest": _filled(state, None, ())}


def _filled(
    value: Any, tensors: Mapping[tuple[Any, ...], torch.Tensor] | None, path: tuple[Any, ...]
) -> Any:
    """Return a copy with the tensors at their paths; None there without any."""
    if isinstance(value, torch.Tensor) or (tensors is not None and path in tensors):
        return None if tensors is None else tensors[path]
    if isinstance(value, dict):
        return {k: _filled(v, tensors, (*path, k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(v, tensors, (*path, k)) for k, v in enumerate(value))
    return value
