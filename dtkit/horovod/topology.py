"""Topology: where a rank stands among the ranks and the hosts of a job."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from dtkit.horovod.place import Place

__all__ = ["Topology", "topology_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Where a rank stands; a host's ranks are counted in the host's own order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    is_homogeneous: bool


def topology_of(place: Place) -> tuple[Topology, list[str]]:
    """Exchange what each rank knows of its host; returns the hosts too, by rank."""
    mine = (place.node or socket.gethostname(), place.local_rank, socket.gethostname())
    everyone: list[tuple[str, int | None, str]] = [mine] * place.size
    dist.all_gather_object(everyone, mine)
    nodes = [node for node, _, _ in everyone]
    order = list(dict.fromkeys(nodes))
    local_ranks = [
        nodes[:r].count(node) if local is None else local
        for r, (node, local, _) in enumerate(everyone)
    ]
    sizes = [nodes.count(node) for node in order]
    local_rank = local_ranks[place.rank]
    peers = [nodes[r] for r in range(place.size) if local_ranks[r] == local_rank]
    topology = Topology(
        rank=place.rank, size=place.size, local_rank=local_rank,
        local_size=nodes.count(mine[0]), cross_rank=peers.index(mine[0]),
        cross_size=len(peers), is_homogeneous=len(set(sizes)) == 1,
    )  # fmt: skip
    return topology, [host for _, _, host in everyone]
