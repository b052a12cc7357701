"""`gossip`: after each step a rank averages its weights with one other's, picked at random.

source: Lian et al., Asynchronous Decentralized Parallel SGD (AD-PSGD), 2018. There the
partner is changed in the middle of its step; here it finds the change at its next one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from dtkit.engine.loose.free import Free
from dtkit.engine.loose.hub import Hub
from dtkit.engine.loose.mesh import PeerLostError

if TYPE_CHECKING:
    from dtkit.engine.loose.mesh import Message, Reply

__all__ = ["Gossip"]


class GossipHub(Hub):
    """Averages with other ranks in this rank's name, while it computes.

    What one rank of a pair gains the other loses, so the mean of all replicas changes by
    the ranks' own steps only, whatever meets in between.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._weights = torch.empty(0)
        self._gained = torch.empty(0)
        self._num_met = 0
        self._answers |= {"mix": self._mix}

    def begin(self, generation: int, weights: torch.Tensor) -> None:
        """Stand for these weights from now on."""
        with self._changed:
            self.generation = generation
            self._weights = weights.clone()
            self._gained = torch.zeros_like(weights)
            self._num_met = 0

    def take_in(self, values: torch.Tensor) -> int:
        """Add to `values` what other ranks' visits have changed; returns how many there were."""
        with self._changed:
            values.add_(self._gained)
            self._weights.copy_(values)
            self._gained.zero_()
            num, self._num_met = self._num_met, 0
            return num

    def gave(self, change: torch.Tensor) -> None:
        """Take from the weights what a partner has got."""
        with self._changed:
            self._weights.sub_(change)

    def _mix(self, _number: int, message: Message, vector: torch.Tensor | None) -> Reply:
        """Go half the way to a visitor, and tell him the way."""
        assert vector is not None  # noqa: S101  for the type checker: who asks gives one
        with self._changed:
            if message["generation"] != self.generation:  # one of us trains another model now
                return {}, None
            change = (vector - self._weights).mul_(0.5)
            self._weights.add_(change)
            self._gained.add_(change)
            self._num_met += 1
            return {"is_met": True}, change


class Gossip(Free):
    """Averages with one other rank after each step."""

    hub: GossipHub

    def make_hub(self, rank: int, size: int) -> Hub:
        """Return what stands for this rank while it computes."""
        return GossipHub(rank, size)

    def begun(self, values: torch.Tensor) -> None:
        """Begin with these weights."""
        # Not the cell's random numbers: those shall be what they are without dtkit.
        self._picks = random.Random(self.hub.rank)
        self._change = torch.empty_like(values)
        self.hub.begin(self.hub.generation + 1, values)

    def exchange(self, values: torch.Tensor) -> None:
        """Average with a rank that lives."""
        num_met = self.hub.take_in(values)
        others = sorted(self.hub.living - {self.hub.rank})
        if not others:
            return
        partner = self._picks.choice(others)
        message = {"ask": "mix", "generation": self.hub.generation}
        try:
            reply = self.mesh.ask(partner, message, values, into=self._change)
        except PeerLostError:
            self.hub.lost(partner)
            return
        if reply.get("is_met"):
            values.sub_(self._change)
            self.hub.gave(self._change)
            distance = 2 * torch.linalg.vector_norm(self._change)
            self.measured(distance / torch.linalg.vector_norm(values), num_met)

    def settle(self, values: torch.Tensor, where: str) -> None:
        """Average over all ranks once they have come here."""
        self.ask({"ask": "arrive", "where": where})
        self.hub.take_in(values)
        self.ask({"ask": "average", "where": where}, values.clone(), into=values)
