"""Meshes: the ranks of a group in rows and columns; one for each arrangement of them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtkit.engine.living import alive

__all__ = ["device_here", "make_mesh"]

_MESHES: dict[Any, DeviceMesh] = {}
"""By ranks, shape and names, for the life of the process.

torch takes meshes for equal that have these alike, and keeps in its caches the one that it saw
first: a second one would meet the groups of the first, which may be gone.
"""
_READY: WeakKeyDictionary[dist.ProcessGroup, set[Any]] = WeakKeyDictionary()
"""Which meshes have the connections of a group: each opens its own."""

# Any, below: what torch keeps in a mesh.


def device_here() -> torch.device:
    """Return the device that this rank computes on."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_mesh(
    group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]
) -> DeviceMesh:
    """Return the mesh of a group's ranks in this shape, the last axis' ranks side by side.

    A collective, if the group has not had this mesh yet. There is one mesh: what refers to it
    since an earlier group of the same ranks goes on in this one.
    """
    ranks = dist.get_process_group_ranks(group)
    device = device_here().type
    key = (tuple(ranks), device, shape, names)
    ready = _READY.setdefault(group, set())
    if key not in ready:
        groups = _groups_of(group, shape)
        if key in _MESHES:
            _renew(_MESHES[key], groups)
        elif len(shape) == 1:
            _MESHES[key] = DeviceMesh.from_group(group, device, mesh_dim_names=names)
        else:
            mesh = torch.tensor(ranks).reshape(shape)
            _MESHES[key] = DeviceMesh.from_group(groups, device, mesh=mesh, mesh_dim_names=names)
        ready.add(key)
    return _MESHES[key]


def _groups_of(group: dist.ProcessGroup, shape: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """Return this rank's group along each axis of a mesh of a group's ranks; a collective."""
    if len(shape) == 1:
        return [group]
    ranks = torch.tensor(dist.get_process_group_ranks(group)).reshape(shape)
    place = [int(i) for i in (ranks == dist.get_rank()).nonzero()[0]]
    groups = []
    for axis in range(len(shape)):
        index = [slice(None) if i == axis else place[i] for i in range(len(shape))]
        line = ranks[tuple(index)].tolist()
        # Locally: only those who are in it make it, so that other ranks need not be here.
        groups.append(dist.new_group(line, use_local_synchronization=True))
    return groups


def _renew(mesh: DeviceMesh, groups: list[dist.ProcessGroup]) -> None:
    """Give a mesh, and those cut out of it, other groups."""
    names = tuple(mesh.mesh_dim_names or ())
    inside: Any = mesh
    inside._dim_group_names = [axis.group_name for axis in groups]  # noqa: SLF001  no public way
    inside._pg_registry.update({axis.group_name: axis for axis in groups})  # noqa: SLF001
    for other in alive(DeviceMesh):
        if other is not mesh and getattr(other, "_root_mesh", None) is mesh:
            part: Any = other
            part._dim_group_names = [  # noqa: SLF001
                groups[names.index(name)].group_name for name in other.mesh_dim_names or ()
            ]
