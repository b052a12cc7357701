"""Free strategies: no rank waits for another within a bound, and one that dies stops nobody."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from dtkit.engine import randomness, weights
from dtkit.engine.loose.dealt import Dealt
from dtkit.engine.loose.flat import Flat
from dtkit.engine.loose.mesh import Mesh, PeerLostError
from dtkit.engine.loose.replica import Replica
from dtkit.engine.parts import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from dtkit.engine.loose.hub import Hub
    from dtkit.engine.loose.mesh import Message
    from dtkit.engine.process.group import Group
    from dtkit.engine.run import ActiveRun

__all__ = ["Free"]


class Free(Part):
    """Exchanges weights after each step of this rank, whenever that is.

    Nothing here is a collective but the beginning. What all ranks must know is asked of
    the leader, the first rank that lives.

    Args:
        run: the run.
        group: what frees this rank, when it is asked to, frees it here too.
    """

    hub: Hub
    mesh: Mesh

    def __init__(self, run: ActiveRun, group: Group) -> None:
        assert run.autopilot is not None  # noqa: S101  for the type checker
        assert run.wire is not None  # noqa: S101  for the type checker
        self._autopilot, self._wire, self._recorder = run.autopilot, run.wire, run.recorder
        self._replica = Replica(run.autopilot.adoption)
        self._group = group
        self._flat: Flat | None = None
        self._is_open = False
        self._num_spread = 0
        self._last_sent_bytes = 0

    def make_hub(self, rank: int, size: int) -> Hub:
        """Return what answers the other ranks."""
        raise NotImplementedError

    def begun(self, values: torch.Tensor) -> None:
        """The weights that are trained are these from now on."""
        raise NotImplementedError

    def exchange(self, values: torch.Tensor) -> None:
        """The step made these weights of this rank: put in what it goes on from."""
        raise NotImplementedError

    def settle(self, values: torch.Tensor, where: str) -> None:
        """Put in weights that are equal on all ranks, which make no steps meanwhile."""
        raise NotImplementedError

    def step_aside(self) -> None:
        """Let nobody wait for this rank's next step."""

    def begin(self) -> None:
        """Connect the ranks."""
        group = self._wire.group
        self.hub = self.make_hub(group.rank(), group.size())
        self.mesh = Mesh(group, self.hub.answer, self.hub.lost)
        self._is_open = True
        self._group.on_release.append(self._cut)
        seed = int.from_bytes(randomness.fingerprint()[:4], "big")
        self._autopilot.deal(
            lambda written, number: Dealt(written, group, self._ticket, number=number, seed=seed)
        )
        self._wire.before_collective = self.step_aside
        self._wire.spread = self._spread

    def before_step(self, optimizer: Optimizer) -> None:
        """See whether the optimizer is a new one."""
        if not self._replica.saw(optimizer):
            return
        number = self.hub.generation
        if self._flat is not None:
            self._flat.read()
            self.settle(self._flat.values, f"end of {number}")
            self._flat.write()
            self.ask({"ask": "arrive", "where": f"settled {number}"})
        tensors = [*self._replica.weights(), *self._replica.statistics()]
        if not tensors:
            self._flat = None
            return
        self._flat = Flat(tensors, torch.device("cpu"))
        self.begun(self._flat.read())
        self.ask({"ask": "arrive", "where": f"begin after {number}", "goes_on": True})
        self.hub.forget_offers()
        self._last_sent_bytes = self.mesh.sent_bytes

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's
        """Exchange weights."""
        if self._flat is None:
            return
        begun_s = time.perf_counter()
        self.exchange(self._flat.read())
        self._flat.write()
        self._count_sent()
        self._recorder.waited(time.perf_counter() - begun_s)

    def end(self, state: str) -> None:
        """Make everything equal on all ranks that live, and part."""
        if not self._is_open:
            return
        try:
            if state != "failed":
                self._settle_all()
                self._count_sent()
        finally:
            self._group.on_release.remove(self._cut)
            self._wire.before_collective = lambda: None
            self.hub.cut()
            self.mesh.close()

    def ask(
        self,
        message: Message,
        vector: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
    ) -> Message:
        """Ask the leader; if it dies, the next one."""
        while True:
            leader = self.hub.leader
            if leader == self.hub.rank:
                reply, answer = self.hub.answer(leader, message, vector)
                if answer is not None and into is not None:
                    into.copy_(answer)
                return reply
            try:
                return self.mesh.ask(leader, message, vector, into)
            except PeerLostError:
                self.hub.lost(leader)

    def measured(self, divergence: torch.Tensor, staleness: int) -> None:
        """Record what an exchange has found.

        Args:
            divergence: how far the others' weights were from this rank's, relative to their size.
            staleness: updates of others that the step was computed without.
        """
        self._recorder.log({"divergence": float(divergence), "staleness": float(staleness)})

    def _count_sent(self) -> None:
        now_bytes = self.mesh.sent_bytes  # what others asked for meanwhile is in it
        num_bytes = now_bytes - self._last_sent_bytes
        self._last_sent_bytes = now_bytes
        self._wire.on_sent(num_bytes, num_bytes)

    def _spread(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Take the leader's values: a rank that dies would end a collective for all."""
        self._num_spread += 1
        where = str(self._num_spread)
        held = [tensor for tensor in tensors if weights.has_data(tensor)]
        about = ";".join(f"{tuple(t.shape)}{t.dtype}" for t in held)
        mine = _packed(held)
        self.hub.offer(where, about, mine)
        theirs = torch.empty_like(mine)
        if not self.ask({"ask": "spread", "where": where, "about": about}, into=theirs):
            return False
        _unpack(theirs, held)
        return True

    def _ticket(self, of: str, seen: int) -> int:
        return int(self.ask({"ask": "ticket", "pass": of, "seen": seen})["ticket"])

    def _cut(self) -> None:
        self.hub.cut()
        self.mesh.cut()

    def _settle_all(self) -> None:
        if self._flat is not None:
            self._flat.read()
            mine = _packed(self._replica.rest())
            self.hub.rest = mine
            self.settle(self._flat.values, "end")
            self._flat.write()
            self._take_rest(mine)
        else:
            self.ask({"ask": "arrive", "where": "end"})
        if self.hub.leader == self.hub.rank:
            self.hub.wait_others_left()

    def _take_rest(self, mine: torch.Tensor) -> None:
        """Take the leader's other state, if it has the same parts."""
        rest = self._replica.rest()
        if self.hub.leader == self.hub.rank:
            return
        theirs = torch.empty_like(mine)
        if self.ask({"ask": "rest", "size": mine.numel()}, into=theirs).get("is_same"):
            _unpack(theirs, rest)


def _packed(tensors: list[torch.Tensor]) -> torch.Tensor:
    parts = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


@torch.no_grad()
def _unpack(packed: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    start = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        piece = packed[start : start + num_bytes].clone().view(tensor.dtype)
        tensor.data.copy_(piece.view(tensor.shape))
        start += num_bytes
