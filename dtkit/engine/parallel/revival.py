"""Models over several ranks go on in the next process group, if all of their ranks are in it.

Each rank has its part still. What is missing is a group: meshes are given the new one's, in place,
so that parameters, optimizers and hooks that refer to a mesh stay as they are.
"""

from __future__ import annotations

import gc
import hashlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtkit.engine.parallel.layout import MARK, adopt_mesh, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from weakref import ref

    from torch import nn

    from dtkit.engine.parallel.layout import Layout

__all__ = ["fingerprint", "revive"]

# Any, below: what torch keeps in a mesh.


def fingerprint(retired: Sequence[ref[nn.Module]]) -> int:
    """Return a number that is the same on all ranks if they have parts of the same models.

    0 stands for no models; ranks that have lost theirs, and new engines, have none.
    """
    texts = [_described(model, layout) for model, layout in _living(retired)]
    if not texts:
        return 0
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:7], "big")


def revive(retired: Sequence[ref[nn.Module]]) -> int:
    """Let models compute again, in the group that there is now; return how many. A collective."""
    group = dist.group.WORLD
    assert group is not None  # noqa: S101  it was just built
    models = _living(retired)
    done: set[int] = set()
    for model, layout in models:
        mesh = layout.mesh
        if id(mesh) not in done:
            done.add(id(mesh))
            _renew(mesh, group)
        layout.renew(group)
        if layout.again is not None:
            try:
                layout.again(model)
            except Exception as error:  # noqa: BLE001  the model says it when it is used
                layout.gave_up(f"{type(error).__name__}: {error}")
    return len(models)


def _living(retired: Sequence[ref[nn.Module]]) -> list[tuple[nn.Module, Layout]]:
    """Return the models that are alive still and whose ranks can all be here."""
    found = [(model, model.__dict__[MARK]) for model in (r() for r in retired) if model is not None]
    everybody = list(range(dist.get_world_size()))
    return [
        (model, layout) for model, layout in found
        if layout.mesh.mesh.flatten().tolist() == everybody and layout.rank == dist.get_rank()
    ]  # fmt: skip


def _described(model: nn.Module, layout: Layout) -> str:
    params = ",".join(f"{n}{tuple(p.shape)}" for n, p in model.named_parameters())
    return f"{type(model).__name__} {layout.kind} {layout.mesh.mesh.tolist()} {params}"


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
