"""Models over several ranks go on in the next process group, if all of their ranks are in it.

Each rank has its part still. What is missing is a group: meshes are given the new one's, in place,
so that parameters, optimizers and hooks that refer to a mesh stay as they are.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtkit.engine.parallel.layout import MARK
from dtkit.engine.parallel.levelling import level
from dtkit.engine.parallel.meshes import adopt_mesh, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from weakref import ref

    from torch import nn

    from dtkit.engine.parallel.layout import Layout

__all__ = ["revive"]

# Any, below: what torch keeps in a mesh.


def revive(retired: Sequence[ref[nn.Module]]) -> int:
    """Let models compute again, in the group that there is now; return how many. A collective.

    Those that all ranks have: some may hold one that the others have let go of.
    """
    group = dist.group.WORLD
    assert group is not None  # noqa: S101  it was just built
    models = {layout.number: (model, layout) for model, layout in _living(retired)}
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, list(models))
    everywhere = sorted(set(models).intersection(*numbers))
    done: set[int] = set()
    for number in everywhere:
        model, layout = models[number]
        if id(layout.mesh) not in done:
            done.add(id(layout.mesh))
            _renew(layout.mesh, group)
        steps = layout.renew(group)
        try:
            if layout.again is not None:
                layout.again(model)
        except Exception as error:  # noqa: BLE001  the model says it when it is used
            layout.gave_up(f"{type(error).__name__}: {error}")
        else:
            layout.fell_behind(level(model, layout, steps))
    return len(everywhere)


def _living(retired: Sequence[ref[nn.Module]]) -> list[tuple[nn.Module, Layout]]:
    """Return the models that are alive still and whose ranks can all be here."""
    found = [(model, model.__dict__[MARK]) for model in (r() for r in retired) if model is not None]
    everybody = list(range(dist.get_world_size()))
    return [
        (model, layout) for model, layout in found
        if layout.mesh.mesh.flatten().tolist() == everybody and layout.rank == dist.get_rank()
    ]  # fmt: skip


def _renew(mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
    """Give a mesh, and those cut out of it, the groups of its ranks in the new group."""
    names = tuple(mesh.mesh_dim_names or ())
    made = groups_of(group, tuple(mesh.mesh.shape))
    inside: Any = mesh
    inside._dim_group_names = [axis.group_name for axis in made]  # noqa: SLF001  no public way
    inside._pg_registry.update({axis.group_name: axis for axis in made})  # noqa: SLF001
    adopt_mesh(group, mesh)
    for other in [o for o in gc.get_objects() if issubclass(type(o), DeviceMesh)]:
        if other is not mesh and getattr(other, "_root_mesh", None) is mesh:
            part: Any = other
            part._dim_group_names = [  # noqa: SLF001
                made[names.index(name)].group_name for name in other.mesh_dim_names or ()
            ]
