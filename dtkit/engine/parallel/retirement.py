"""Divided models when their process group ends: they keep their parts, and let go of the group.

FSDP holds the group. Were it left to do so, the group's connections would end with the
model, at any time, in the middle of the next group's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dtkit.engine.living import alive, living
from dtkit.engine.parallel.layout import MARK, laid_out
from dtkit.engine.parallel.pieces import plain_class, strip
from dtkit.engine.parallel.pipelining import Pipeline

if TYPE_CHECKING:
    from dtkit.engine.parallel.layout import Layout

__all__ = ["retire"]

_GUARDED = "_dtkit_guarded"


def retire() -> list[ref[nn.Module]]:
    """Take every model of this process out of its group; return those that `revive` takes.

    To be called while the group exists.
    """
    sharded: list[Any] = [m for m in alive(nn.Module) if isinstance(m, FSDPModule)]
    for model in sharded:
        model.reshard()
    for model in sharded:
        model.__class__ = plain_class(model)
        strip(model.__dict__)
        _module_state_mapping.pop(model, None)  # it may be sharded again
    found = laid_out()
    for model in found:
        _guard(model, model.__dict__[MARK])
    if any(model.__dict__[MARK].kind == "pipelined" for model in found):
        for pipe in living(Pipeline):
            pipe.retire()
    for mesh in alive(DeviceMesh):
        mesh._pg_registry.clear()  # noqa: SLF001  its other facts are still wanted
    return [ref(model) for model in found]


def _guard(model: nn.Module, layout: Layout) -> None:
    """Let a model say why it cannot be used any more, as long as its group is gone."""
    if layout.kind == "pipelined" or _GUARDED in model.__dict__:  # a pipeline looks by itself
        return
    model.__dict__[_GUARDED] = True
    model.register_forward_pre_hook(lambda *_: layout.before_use(), prepend=True)
