"""`async:STALENESS`: ranks push what a step changed to a server, and take its weights, unasked.

What travels is the change that the cell's own optimizer made, whichever that is, as in the
parameter server of Ho et al. (SSP, 2013), whose updates are increments. The server is a
thread of the first rank that lives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.loose.free import Free
from dtkit.engine.loose.hub import Hub

if TYPE_CHECKING:
    from dtkit.engine.loose.mesh import Message, Reply
    from dtkit.engine.process.group import Group
    from dtkit.engine.run import ActiveRun

__all__ = ["AsyncServer"]


class ServerHub(Hub):
    """Keeps the weights that all ranks add to.

    A rank's step is stale by the updates of others that it was computed without. No other
    rank may make more than `bound` of them while a step is under way, and waits before it
    would. So no one waits for a rank that is slow but within the bound, however long it
    stays slow; in SSP clocks, which count from the beginning, all would in the end go at
    the slowest rank's pace. It cannot deadlock: who waits for a rank has been answered
    after it, so nobody waits for himself through others.

    Args:
        rank: this rank's number among those of the run.
        size: how many they are.
        bound: updates of each other rank that a step may lack, 1 or more, or infinity.
    """

    def __init__(self, rank: int, size: int, bound: float) -> None:
        super().__init__(rank, size)
        self._bound = bound
        self._weights = torch.empty(0)
        self._version = 0
        self._num_pushed = dict.fromkeys(range(size), 0)
        self._fetched: dict[int, dict[int, int]] = {}
        """Of each rank whose step is under way, the updates that it knows, by rank."""
        self._answers |= {"update": self._update, "fetch": self._fetch, "aside": self._aside}

    def begin(self, generation: int, weights: torch.Tensor) -> None:
        """Serve these weights from now on, equal on all ranks."""
        with self._changed:
            self.generation = generation
            self._weights = weights.clone()
            self._fetched = {r: dict(self._num_pushed) for r in self.living}

    def keep(self, weights: torch.Tensor, version: int) -> None:
        """Remember what this rank has got from the leader, should it become the leader."""
        with self._changed:
            if self.leader != self.rank:
                self._weights.copy_(weights)
                self._version = version

    def came(self, number: int) -> None:
        """A rank makes no step until all others are where it is."""
        self._fetched.pop(number, None)

    def goes_on(self, number: int) -> None:
        """A rank computes its next step once all others are where it is."""
        # Also of one that has stepped aside since the leader began.
        self._fetched[number] = dict(self._num_pushed)

    def _aside(self, number: int, _message: Message, _vector: torch.Tensor | None) -> Reply:
        with self._changed:
            self.came(number)
            self._changed.notify_all()
        return {}, None

    def _update(self, number: int, message: Message, vector: torch.Tensor | None) -> Reply:
        """Add a rank's update, as soon as no other rank's step becomes too stale by it."""
        assert vector is not None  # noqa: S101  for the type checker: who asks gives one
        with self._changed:
            # A step that waits here is under way still, and becomes staler.
            self._wait(lambda: self._may_push(number))
            staleness = max(0, self._version - message["version"])
            self._weights.add_(vector)
            self._version += 1
            self._num_pushed[number] += 1
            self._fetched[number] = dict(self._num_pushed)
            self._changed.notify_all()
            return {"version": self._version, "staleness": staleness}, self._weights.clone()

    def _may_push(self, number: int) -> bool:
        return all(
            self._num_pushed[number] - known[number] < self._bound
            for other, known in self._fetched.items()
            if other in self.living
        )

    def _fetch(self, _number: int, _message: Message, _vector: torch.Tensor | None) -> Reply:
        with self._changed:
            return {"version": self._version}, self._weights.clone()


class AsyncServer(Free):
    """Adds each step to the server's weights, and goes on from these.

    Args:
        bound: updates of each other rank that a step may lack; see `ServerHub`.
    """

    hub: ServerHub

    def __init__(self, run: ActiveRun, group: Group, *, bound: float) -> None:
        super().__init__(run, group)
        self._bound = bound
        self._version = 0
        self._base = torch.empty(0)

    def make_hub(self, rank: int, size: int) -> Hub:
        """Return the server."""
        return ServerHub(rank, size, self._bound)

    def begun(self, values: torch.Tensor) -> None:
        """Begin with these weights."""
        self._base = values.clone()
        self.hub.begin(self.hub.generation + 1, values)

    def exchange(self, values: torch.Tensor) -> None:
        """Push what the step changed, and take the server's weights."""
        update = values - self._base
        reply = self.ask({"ask": "update", "version": self._version}, update, into=values)
        self._version = reply["version"]
        moved = torch.linalg.vector_norm(values - self._base - update)
        self._base.copy_(values)
        self.hub.keep(values, self._version)
        self.measured(moved / torch.linalg.vector_norm(values), reply["staleness"])

    def settle(self, values: torch.Tensor, where: str) -> None:
        """Take the server's weights once all ranks have come here."""
        self.ask({"ask": "arrive", "where": where})
        self._version = self.ask({"ask": "fetch"}, into=values)["version"]

    def step_aside(self) -> None:
        """Let nobody wait for this rank's next step: it waits for all others first."""
        self.ask({"ask": "aside"})
