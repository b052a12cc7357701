"""Loose strategies: each rank makes steps of its own, and the replicas are brought together.

`--strategy` chooses one (see `dtkit.strategy`); `make` gives the part of the run that does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.engine.loose.gossip import Gossip
from dtkit.engine.loose.rounds import DiLoCo, LocalSGD
from dtkit.engine.loose.server import AsyncServer
from dtkit.engine.parts import Part
from dtkit.engine.process.agent import agent
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from dtkit.engine.run import ActiveRun

__all__ = ["make"]


def make(run: ActiveRun, *, strategy: str) -> Part:
    """Return what keeps the replicas of a run together."""
    autopilot, wire = run.autopilot, run.wire
    if autopilot is None or wire is None:  # one rank: there is nothing to bring together
        return Part()
    chosen = Strategy.parse(strategy)
    group = agent().group
    assert group is not None  # noqa: S101  for the type checker: the run has it
    if chosen.name == "gossip":
        return Gossip(run, group)
    assert chosen.value is not None  # noqa: S101  for the type checker: the others take a number
    if chosen.name == "async":
        return AsyncServer(run, group, bound=chosen.value)
    kind = DiLoCo if chosen.name == "diloco" else LocalSGD
    return kind(autopilot.adoption, wire, run.recorder, every=int(chosen.value))
