"""Meshes: the ranks of a group in rows and columns, made once for each group."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["adopt_mesh", "device_here", "groups_of", "make_mesh"]

_MESHES: WeakKeyDictionary[dist.ProcessGroup, dict[Any, DeviceMesh]] = WeakKeyDictionary()
"""Made once for each group: every mesh opens connections."""


def device_here() -> torch.device:
    """Return the device that this rank computes on."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_mesh(
    group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]
) -> DeviceMesh:
    """Return the mesh of a group's ranks in this shape, the last axis' ranks side by side."""
    known = _MESHES.setdefault(group, {})
    if (shape, names) not in known:
        known[shape, names] = _new_mesh(group, shape, names)
    return known[shape, names]


def _new_mesh(
    group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]
) -> DeviceMesh:
    device = device_here().type
    ranks = torch.tensor(dist.get_process_group_ranks(group)).reshape(shape)
    groups = groups_of(group, shape)
    if len(shape) == 1:
        return DeviceMesh.from_group(group, device, mesh_dim_names=names)
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=names)


def groups_of(group: dist.ProcessGroup, shape: tuple[int, ...]) -> list[dist.ProcessGroup]:
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


def adopt_mesh(group: dist.ProcessGroup, mesh: DeviceMesh) -> None:
    """Let models that are laid out in a group use a mesh that has got its groups."""
    known = _MESHES.setdefault(group, {})
    known[tuple(mesh.mesh.shape), tuple(mesh.mesh_dim_names or ())] = mesh
