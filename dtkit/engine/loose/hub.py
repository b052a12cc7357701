"""Hub: what a rank answers the others. The first rank that lives is the leader, whom all ask.

Every rank has a hub, and knows enough to become the leader when those before it have died:
what the leader must know is either in the request, or equal on all ranks about.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from dtkit.engine.loose.mesh import FreedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.engine.loose.mesh import Message, Reply

__all__ = ["Hub"]

_POLL_S = 0.2


class Hub:
    """Deals out batches, and lets ranks wait for each other.

    Args:
        rank: this rank's number among those of the run.
        size: how many they are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.living: set[int] = set(range(size))
        self.generation = 0
        self._size = size
        self._changed = threading.Condition()
        self._is_cut = False
        self._tickets: dict[str, int] = {}
        self._arrived: dict[str, set[int]] = {}
        self._given: dict[str, dict[int, torch.Tensor]] = {}
        self._means: dict[str, torch.Tensor] = {}
        self._offered: dict[str, tuple[str, torch.Tensor]] = {}
        self.rest: torch.Tensor = torch.empty(0, dtype=torch.uint8)
        """What the others shall take over from this rank at the end."""
        self._answers: dict[str, Callable[[int, Message, torch.Tensor | None], Reply]] = {
            "ticket": self._ticket,
            "arrive": self._arrive,
            "average": self._average,
            "rest": self._tell_rest,
            "spread": self._spread,
        }

    @property
    def leader(self) -> int:
        """Whom this rank asks."""
        return min(self.living)

    def answer(self, number: int, message: Message, vector: torch.Tensor | None) -> Reply:
        """Answer a rank."""
        return self._answers[message["ask"]](number, message, vector)

    def lost(self, number: int) -> None:
        """Note that a rank is gone."""
        with self._changed:
            self.living.discard(number)
            self._changed.notify_all()

    def cut(self) -> None:
        """Free whoever waits here."""
        with self._changed:
            self._is_cut = True
            self._changed.notify_all()

    def wait_others_left(self) -> None:
        """Wait until all other ranks have closed their connections: they have been answered."""
        with self._changed:
            self._wait(lambda: self.living <= {self.rank})

    def _wait(self, is_time: Callable[[], bool]) -> None:
        while not is_time():
            if self._is_cut:
                raise FreedError
            # Not for ever at once: a signal is served only in between.
            self._changed.wait(_POLL_S)

    def _ticket(self, _number: int, message: Message, _vector: torch.Tensor | None) -> Reply:
        """Give the next batch of a pass; the first ones are the ranks' own, one each."""
        with self._changed:
            of, seen = message["pass"], message["seen"]
            ticket = max(self._tickets.get(of, self._size), seen + 1)
            self._tickets[of] = ticket + 1
            return {"ticket": ticket}, None

    def _arrive(self, number: int, message: Message, _vector: torch.Tensor | None) -> Reply:
        """Let a rank wait until all have come to the same place."""
        with self._changed:
            arrived = self._arrived.setdefault(message["where"], set())
            arrived.add(number)
            if message.get("goes_on"):
                self.goes_on(number)
            else:
                self.came(number)
            self._changed.notify_all()
            self._wait(lambda: self.living <= arrived)
            return {}, None

    def offer(self, where: str, about: str, values: torch.Tensor) -> None:
        """Have something ready for the others, when they come to the same place."""
        with self._changed:
            self._offered[where] = about, values
            self._changed.notify_all()

    def forget_offers(self) -> None:
        """Let go of it: all ranks that live have come further."""
        with self._changed:
            self._offered.clear()

    def _spread(self, _number: int, message: Message, _vector: torch.Tensor | None) -> Reply:
        """Give what this rank has at a place, once it is there, to a rank that has its like."""
        where = message["where"]
        with self._changed:
            self._wait(lambda: where in self._offered)
            about, values = self._offered[where]
        return ({"is_same": True}, values) if about == message["about"] else ({}, None)

    def came(self, number: int) -> None:
        """A rank makes no step until all others are where it is."""

    def goes_on(self, number: int) -> None:
        """A rank computes its next step once all others are where it is."""

    def _average(self, number: int, message: Message, vector: torch.Tensor | None) -> Reply:
        """Average what all ranks give."""
        where = message["where"]
        assert vector is not None  # noqa: S101  for the type checker: who asks gives one
        with self._changed:
            given = self._given.setdefault(where, {})
            given[number] = vector.clone()
            self._changed.notify_all()
            self._wait(lambda: where in self._means or self.living <= given.keys())
            if where not in self._means:  # ranks leave as soon as they have it
                self._means[where] = torch.stack(list(given.values())).mean(0)
            return {}, self._means[where]

    def _tell_rest(self, _number: int, message: Message, _vector: torch.Tensor | None) -> Reply:
        if message["size"] != self.rest.numel():
            return {}, None
        return {"is_same": True}, self.rest
