"""Repair: new engines in the place of lost ones, filled again from a healthy rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit._ranks import format_ranks
from dtkit.cluster import interrupt_held
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.cluster import Engines
    from dtkit.driver.procgroup import ProcessGroup

__all__ = ["Repair"]


class Repair:
    """The one place that brings ranks back.

    Args:
        engines: where the ranks live.
        group: the group across them.
        replace: ends and starts the engines of ranks.
        facts: what each rank says of itself; renewed for all.
    """

    def __init__(
        self,
        engines: Engines,
        group: ProcessGroup,
        replace: Callable[[Sequence[int]], None],
        facts: dict[int, dict[str, Any]],
    ) -> None:
        self._engines = engines
        self._group = group
        self._replace = replace
        self._facts = facts

    def rebuild(self) -> None:
        """Build the group anew; the ranks keep their namespaces.

        Replicas of a DDP model can be a step apart when a rank fails: one had the
        sum when another lost it. They are made equal, as wrapping the model does.
        """
        with interrupt_held():
            self._facts.update(self._group.rebuild())
        names = self._engines.call("dtkit.engine.replicas:names_of_replicas", ranks=[0])[0]
        if names:
            self._engines.call("dtkit.engine.process.refill:equalize", (names, 0))

    def restart(self, ranks: Sequence[int], *, refill: bool) -> str:
        """Put new engines in the place of these ranks', and build the group anew.

        Args:
            ranks: whose engines are lost, or are to be ended.
            refill: give the new ones what the first healthy rank holds.

        Returns:
            What was done, in a sentence.

        Raises:
            InvalidInputError: there is no healthy rank to refill from.
            StartError: a new engine did not come up.
        """
        away = set(ranks) | set(self._engines.lost)
        healthy = [rank for rank in self._engines.ranks if rank not in away]
        if refill and not healthy:
            msg = "--refill: there is no healthy rank to take state from; run the cells again"
            raise InvalidInputError(msg)
        with interrupt_held():
            return self._put_new(ranks, healthy if refill else [])

    def _put_new(self, ranks: Sequence[int], healthy: Sequence[int]) -> str:
        self._group.leave(without=ranks)
        self._replace(ranks)
        text = f"{format_ranks(tuple(ranks), len(self._engines.ranks))}: new engine"
        if not healthy:
            self._facts.update(self._group.build())
            return f"{text}, no names yet"
        call = self._engines.call
        exported = call("dtkit.engine.process.refill:export", ranks=healthy[:1])
        payload, names, left_out = exported[healthy[0]]
        call("dtkit.engine.process.refill:accept", (payload,), ranks=ranks)
        self._facts.update(self._group.build())
        donor = healthy[0]
        equal = call("dtkit.engine.process.refill:equalize", (names, donor))[donor]
        text += f" with the {len(names)} names and the random state of rank {donor}"
        if equal:
            text += f"; {', '.join(equal)} equal on all ranks"
        if left_out:
            text += f"; not carried: {', '.join(left_out)}"
        return text
