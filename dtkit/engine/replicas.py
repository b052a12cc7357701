"""DistributedDataParallel models of the user's, taken from one group into the next.

Such a model holds the group. Left alone it is of no use once the group is
rebuilt, and worse: dropped after its group was destroyed it deadlocks in its
destructor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine.living import alive
from dtkit.engine.models import weight_ids
from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["attach", "detach", "names_of_replicas"]

_HELD = ("process_group", "reducer", "logger")


def detach() -> list[DistributedDataParallel]:
    """Take every DDP model of this process out of its group; return those of the whole group.

    To be called while the group exists. Their reducers end with the next garbage collection.
    """
    whole = []
    for model in alive(DistributedDataParallel):
        held = vars(model)
        # One whose constructor raised has nothing to be taken along.
        if "reducer" in held and held.get("process_group") is dist.group.WORLD:
            whole.append(model)
        for name in _HELD:
            held.pop(name, None)
    return whole


def attach(models: Iterable[DistributedDataParallel]) -> None:
    """Let DDP models work in the present group; sends nothing."""
    for model in models:
        state: dict[str, Any] = vars(model).copy()  # Any: a module's attributes
        hooks, state["_comm_hooks"] = state["_comm_hooks"], []
        model.__setstate__(state)
        for hook, known in hooks:
            model.register_comm_hook(_moved(known, model.process_group), hook)


def names_of_replicas() -> list[str]:
    """Return the names of what belongs to DDP models: their modules and optimizers."""
    names = current_shell().user_ns
    models = [value for value in names.values() if _is_ddp(value)]
    theirs = {id(p) for model in models for p in model.parameters()}
    found = []
    for name, value in list(names.items()):
        mine = weight_ids(value)
        if mine and mine <= theirs and not name.startswith("_"):
            found.append(name)
    return found


def _moved(state: Any, group: dist.ProcessGroup) -> Any:
    """Return a communication hook's state for another group; torch's own states are like this."""
    if isinstance(state, dist.ProcessGroup):
        return group
    if getattr(state, "process_group", None) is not None:
        state.process_group = group
    return state


def _is_ddp(value: object) -> bool:
    """Whether it is a DDP model; asks its type alone, since proxies answer for another."""
    return issubclass(type(value), DistributedDataParallel)
