"""AgentsCluster: engines that are started and ended through the agents of their hosts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from dtkit.cluster.host import POLL_S, START_TIMEOUT_S, HostCluster
from dtkit.cluster.remote.collecting import bring_files, bring_states
from dtkit.cluster.remote.controller import GUARDIAN
from dtkit.cluster.starter import slot_env
from dtkit.errors import DtkitError, StartError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from dtkit.cluster.engines import Engines
    from dtkit.cluster.remote.facts import HostFacts

__all__ = ["AgentsCluster"]

_CLOSE_TIMEOUT_S = 3.0
_ENDING_S = 2.0
"""How long the words about an engine's end may take: what waits for it is told only then. On a busy
host 0.8 s may not do, and the error would not say by what signal it ended."""
_LOOK_S = 0.5
_LOG_LINES = 20


class AgentsCluster(HostCluster):
    """What is done with engines on other hosts, whoever started them."""

    agents: Engines
    """The agents, addressed by the number of their host."""
    hosts: dict[int, HostFacts]
    """What each host says of itself, by the number of its agent."""
    guardian_module = GUARDIAN

    def watch_agents(self, agents: Engines) -> None:
        """Hear of the end of agents from now on."""
        self.agents = agents
        agents.on_left = self._agent_lost

    def watch_engines(self, engines: Engines) -> None:
        """Hear of the end of engines from now on."""
        self.engines = engines
        engines.on_left = self._engine_left

    def start_on_agents(self, engines: Sequence[int]) -> None:
        """Let agents start engines; does not wait for them.

        Raises:
            StartError: an agent could not.
        """
        for agent, mine in self._by_agent(engines).items():
            facts = self.hosts[agent]
            spec = {
                str(slot.engine): slot_env(slot, self._preload, facts.interface, facts.address)
                for slot in self.slots
                if slot.engine in mine
            }
            answer = self.agents.control("start", {"engines": spec}, ranks=[agent]).get(agent)
            if answer is None or "error" in answer:
                why = "does not answer" if answer is None else answer["error"]
                msg = f"{self._host_name(agent)}: its agent {why}"
                raise StartError(msg)

    def replace(self, ranks: Sequence[int]) -> None:
        """End the engines of these ranks if they live, and start new ones under the same ids.

        Raises:
            StartError: a new engine ended or did not come up in time, or a host is gone.
        """
        engines = [slot.engine for slot in self.slots if slot.rank in ranks]
        gone = [self._host_name(agent) for agent in self._by_agent(engines)
                if agent in self.agents.lost]  # fmt: skip
        if gone:
            msg = (
                f"host {', '.join(gone)} is gone, and no engine can be started there: "
                "%dist_shutdown, and %dist_init without it"
            )
            raise StartError(msg)
        for agent, mine in self._by_agent(engines).items():
            self.agents.control("end", {"engines": mine}, ranks=[agent])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.engines.are_gone(ranks):
            self._check_alive(deadline, ())
            time.sleep(POLL_S)
        self.start_on_agents(engines)
        self.wait_registered(ranks)
        self.engines.note_return(ranks)

    def wait_registered(self, ranks: Sequence[int]) -> None:
        """Wait until the engines of these ranks are known to the controller.

        Raises:
            StartError: one ended, or they took too long.
        """
        engines = [slot.engine for slot in self.slots if slot.rank in ranks]
        deadline = time.monotonic() + START_TIMEOUT_S
        look_s = time.monotonic() + _LOOK_S
        while not self.engines.are_registered(ranks):
            if time.monotonic() > look_s:
                self._check_alive(deadline, engines)
                look_s = time.monotonic() + _LOOK_S
            time.sleep(POLL_S)

    def close_agents(self) -> set[int]:
        """End all engines and agents that can be reached; return which have answered."""
        if not hasattr(self, "agents") or self.agents.is_closed:
            return set()
        living = [n for n in self.agents.ranks if self.agents.are_registered([n])]
        with contextlib.suppress(DtkitError):
            return set(self.agents.control("close", ranks=living, timeout_s=_CLOSE_TIMEOUT_S))
        return set()

    def bring_states(self) -> None:
        """Note on this host which runs the ranks of others are in."""
        controller = self.record.controller
        if controller is not None:
            bring_states(self.agents, self.dir, controller)

    def bring_files(self, folder: Path, *, is_over: bool = True) -> None:
        """Bring what is new in the files that ranks on other hosts have written of a run.

        Args:
            folder: the run's.
            is_over: whether it has ended: then files that are not only added to are brought too.
        """
        if not self.agents.is_closed:
            with contextlib.suppress(DtkitError):  # the session has ended meanwhile
                bring_files(self.agents, folder, is_over=is_over)

    def leave(self) -> None:
        """Disconnect; the session lives on for its lease."""
        super().leave()
        if hasattr(self, "agents"):
            self.agents.close()

    def log_tail(self, engine: int, num_lines: int = _LOG_LINES) -> str:
        """Return the last lines of an engine's log."""
        (agent,) = self._by_agent([engine])
        answer = self.agents.control("log", {"engine": engine}, ranks=[agent]).get(agent, {})
        return "\n".join(answer.get("text", "").splitlines()[-num_lines:])

    def _check_alive(self, deadline: float, starting: Sequence[int]) -> None:
        for agent, mine in self._by_agent(starting).items():
            answer = self.agents.control("ended", ranks=[agent]).get(agent, {})
            ended = set(answer.get("engines", ())) & set(mine)
            if ended or agent in self.agents.lost:
                self._raise_not_started(f"on {self._host_name(agent)}", min(ended, default=mine[0]))
        if time.monotonic() > deadline:
            self._raise_not_started(f"no answer in {START_TIMEOUT_S:.0f} s", starting[0])

    def _raise_not_started(self, why: str, engine: int) -> None:
        msg = f"the engines did not start: {why}. Last lines of a log:\n{self.log_tail(engine)}"
        raise StartError(msg)

    def _by_agent(self, engines: Iterable[int]) -> dict[int, list[int]]:
        agent_of = {slot.engine: slot.agent for slot in self.slots}
        found: defaultdict[int, list[int]] = defaultdict(list)
        for engine in engines:
            found[agent_of[engine]].append(engine)
        return dict(found)

    def _host_name(self, agent: int) -> str:
        return next(slot.host for slot in self.slots if slot.agent == agent)

    def _engine_left(self, rank: int) -> None:
        """Ask how an engine ended: not here, on the thread that would bring the answer."""
        if not self._is_stopping:
            threading.Thread(
                target=self._ask_ending, args=(rank,), name="dtkit-ending", daemon=True
            ).start()

    def _ask_ending(self, rank: int) -> None:
        slot = next(slot for slot in self.slots if slot.rank == rank)
        answers: dict[int, dict[str, Any]] = {}
        if slot.agent not in self.agents.lost:
            with contextlib.suppress(DtkitError):
                answers = self.agents.control(
                    "ending", {"engine": slot.engine}, ranks=[slot.agent], timeout_s=_ENDING_S
                )
        if self._is_stopping or self.engines.are_registered([rank]):
            return
        if not answers and not self.agents.are_registered([slot.agent]):
            self._agent_lost(slot.agent)
        else:
            text = answers.get(slot.agent, {}).get("text") or "has ended"
            self.engines.note_death(rank, f"its engine on {slot.host} {text}")

    def _agent_lost(self, number: int) -> None:
        """Count the ranks of a host as lost: engines end with their agent."""
        if self._is_stopping or not hasattr(self, "engines"):
            return
        for slot in self.slots:
            if slot.agent == number and slot.rank not in self.engines.lost:
                self.engines.note_death(
                    slot.rank,
                    f"host {slot.host} is gone: its agent has ended or cannot be reached any more, "
                    "and all engines there with it",
                    is_final=True,
                )
