"""Process sets: collectives among some of the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.horovod.context import Context, current
from dtkit.horovod.movement import Nothing
from dtkit.horovod.negotiation import GLOBAL_SET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ProcessSet",
    "add_process_set",
    "global_process_set",
    "number_of",
    "open_sets",
    "remove_process_set",
]


class ProcessSet:
    """Some of the ranks. Roots of broadcasts are still ranks of the whole job.

    Args:
        ranks: global ranks.
    """

    process_set_id: int | None = None

    def __init__(self, ranks: Iterable[int]) -> None:
        self.ranks: list[int] | None = sorted(ranks)
        if len(set(self.ranks)) != len(self.ranks):
            msg = f"a process set names a rank twice: {self.ranks}"
            raise ValueError(msg)

    def size(self) -> int | None:
        """Return how many ranks it has, None before it was added."""
        return None if self.process_set_id is None else len(self._members())

    def rank(self) -> int | None:
        """Return this rank's place in it, None if it has none."""
        if self.process_set_id is None or not self.included():
            return None
        return self._members().index(current().topology.rank)

    def included(self) -> bool | None:
        """Return whether this rank is in it, None before it was added."""
        if self.process_set_id is None:
            return None
        return current().topology.rank in self._members()

    def _members(self) -> tuple[int, ...]:
        return current().members[number_of(self)]

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


class _GlobalSet(ProcessSet):
    """All ranks."""

    process_set_id = GLOBAL_SET

    def __init__(self) -> None:
        self.ranks = None


global_process_set: ProcessSet = _GlobalSet()


def number_of(process_set: ProcessSet) -> int:
    """Return what a process set is known by.

    Raises:
        ValueError: it was not added, or was removed.
    """
    number = process_set.process_set_id
    if number is None or number not in current().members:
        msg = f"{process_set} is not registered: hvd.add_process_set adds it"
        raise ValueError(msg)
    return number


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Add a process set; all ranks call it, also those that are not in it.

    In Horovod this needs HOROVOD_DYNAMIC_PROCESS_SETS=1; here it is always possible.
    """
    given = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    _add(current(), given)
    return given


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a process set, on all ranks; returns whether it was there."""
    context, number = current(), process_set.process_set_id
    if number is None or number == GLOBAL_SET or number not in context.members:
        return False
    context.agree(GLOBAL_SET, f"remove_set.{number}", Nothing("remove_set", set=number))
    context.drop_group(number)
    process_set.process_set_id = None
    return True


def open_sets(process_sets: Iterable[ProcessSet] | str | None) -> None:
    """Add the process sets that `hvd.init` was given; `"dynamic"` names none."""
    for process_set in () if isinstance(process_sets, str) else process_sets or ():
        _add(current(), process_set)


def _add(context: Context, process_set: ProcessSet) -> None:
    ranks = list(range(context.topology.size)) if process_set.ranks is None else process_set.ranks
    if not ranks or ranks[0] < 0 or ranks[-1] >= context.topology.size:
        msg = f"{process_set}: ranks are 0 to {context.topology.size - 1}"
        raise ValueError(msg)
    name = f"add_set.{','.join(map(str, ranks))}"
    answer = context.agree(GLOBAL_SET, name, Nothing("add_set", ranks=ranks))
    number = answer["meta"]["set"]
    context.add_group(number, tuple(ranks))
    process_set.process_set_id = number
