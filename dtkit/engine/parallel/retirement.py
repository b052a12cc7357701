"""Divided models when their process group ends: they keep their parts, and let go of the group.

FSDP holds the group. Were it left to do so, the group's connections would end with the
model, at any time, in the middle of the next group's.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dtkit.engine.parallel.layout import MARK
from dtkit.engine.parallel.pieces import plain_class, strip

if TYPE_CHECKING:
    from dtkit.engine.parallel.layout import Layout

__all__ = ["retire"]


def retire() -> None:
    """Take every model of this process out of its group; to be called while it exists."""
    sharded = [o for o in gc.get_objects() if issubclass(type(o), FSDPModule)]
    for model in sharded:
        model.reshard()
    for model in sharded:
        model.__class__ = plain_class(model)
        strip(model.__dict__)
    for model in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        layout = model.__dict__.get(MARK)
        if layout is not None and layout.kind != "pipelined":
            guard(model, layout)
    for pipe in [o for o in gc.get_objects() if getattr(type(o), "dtkit_model", False)]:
        pipe.retire()
    for mesh in [o for o in gc.get_objects() if issubclass(type(o), DeviceMesh)]:
        mesh._pg_registry.clear()  # noqa: SLF001  its other facts are still wanted


def guard(model: nn.Module, layout: Layout) -> None:
    """Let a model say why it cannot be used any more, if its group has ended."""
    model.register_forward_pre_hook(lambda *_: layout.check(), prepend=True)
