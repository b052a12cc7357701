"""AttachedRemoteCluster: engines on other hosts that an earlier kernel started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.cluster.attached import AttachedCluster
from dtkit.cluster.engines import Engines
from dtkit.cluster.placement import Slot
from dtkit.cluster.remote.agent import FIRST_ENGINE
from dtkit.cluster.remote.agents import AgentsCluster
from dtkit.cluster.remote.facts import HostFacts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["AttachedRemoteCluster"]

_FACTS_TIMEOUT_S = 10.0


class AttachedRemoteCluster(AgentsCluster, AttachedCluster):
    """Connects to the engines and agents of a session whose kernel is gone.

    Args:
        folder: the session's.
        preload: modules that engines import while they start.

    Raises:
        InvalidInputError: it has ended, or another kernel has it.
        StartError: its controller does not answer.
    """

    def __init__(self, folder: Path, preload: Sequence[str] = ()) -> None:
        AttachedCluster.__init__(self, folder, preload)
        numbers = sorted({slot.agent for slot in self.slots})
        slots = [Slot(number, FIRST_ENGINE + number, 0, None, 1) for number in numbers]
        self.watch_agents(Engines(self.engines.client, slots))
        self.agents.note_missing()
        self.watch_engines(self.engines)
        answers = self.agents.control("facts", timeout_s=_FACTS_TIMEOUT_S)
        self.hosts: dict[int, HostFacts] = {
            n: HostFacts.from_dict(answer) for n, answer in answers.items()
        }
        self.bring_states()

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the session, on all hosts; safe to call twice."""
        self._is_stopping = True
        self.close_agents()
        super().stop(is_hurried=is_hurried)
