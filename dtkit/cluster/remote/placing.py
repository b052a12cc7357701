"""Ranks over hosts: grouped by host, numbered in the order of the hosts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dtkit.cluster.placement import Slot, place_local
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.cluster.remote.facts import HostFacts

__all__ = ["Wish", "place"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What ranks are to have on their hosts.

    Attributes:
        num_ranks: how many; None means one per device. Over several hosts, they say it.
        devices: as `--devices` has it, on every host.
        backend: auto, gloo or nccl.
        oversubscribe: let ranks share a GPU.
    """

    num_ranks: int | None
    devices: str | None
    backend: str
    oversubscribe: bool


def place(
    hosts: Sequence[HostFacts],
    names: Sequence[str],
    num_ranks: Sequence[int | None],
    wish: Wish,
) -> tuple[Slot, ...]:
    """Return one slot per rank.

    Args:
        hosts: what each says of itself.
        names: how each is called in tables.
        num_ranks: of each; None means one per device (CPU: the cores, at most 4).
        wish: what the ranks are to have.

    Raises:
        InvalidInputError: a host lacks the devices; it is named.
    """
    slots: list[Slot] = []
    with_gpus = [facts.host for facts in hosts if facts.gpus]
    if twice := sorted({host for host in with_gpus if with_gpus.count(host) > 1}):
        msg = (
            f"{', '.join(twice)} has several agents, and each would take its GPUs: let the "
            "launcher start one on each node"
        )
        raise InvalidInputError(msg)
    for number, (facts, name) in enumerate(zip(hosts, names, strict=True)):
        try:
            mine = place_local(
                num_ranks[number], wish.devices, oversubscribe=wish.oversubscribe,
                gpus=list(facts.gpus), num_cores=facts.num_cores,
            )  # fmt: skip
        except InvalidInputError as error:
            msg = f"{name}: {error}"
            raise InvalidInputError(msg) from None
        slots += [
            replace(slot, rank=len(slots) + i, engine=len(slots) + i, host=name, agent=number)
            for i, slot in enumerate(mine)
        ]
    kinds = {slot.gpu is None for slot in slots}
    if len(kinds) > 1:
        msg = "some hosts have GPUs and others have none: add --devices cpu, or leave them out"
        raise InvalidInputError(msg)
    return tuple(slots)
