"""A cluster over several hosts: the controller here, an agent on each host, engines below them."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dtkit.cluster.engines import Engines
from dtkit.cluster.host import POLL_S, START_TIMEOUT_S
from dtkit.cluster.placement import Slot, choose_backend
from dtkit.cluster.remote import controller, preflight
from dtkit.cluster.remote.agent import FIRST_ENGINE
from dtkit.cluster.remote.agents import AgentsCluster
from dtkit.cluster.remote.facts import HostFacts
from dtkit.cluster.remote.jobs import MpiFleet, SlurmFleet
from dtkit.cluster.remote.network import address_of
from dtkit.cluster.remote.placing import Wish, place
from dtkit.cluster.remote.profiles import ProfileFleet
from dtkit.cluster.remote.ssh import SshFleet
from dtkit.cluster.starter import quiet_logger
from dtkit.errors import StartError
from dtkit.guard.record import remove
from dtkit.values import HostCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.cluster.remote.fleet import Fleet
    from dtkit.guard.record import SessionRecord
    from dtkit.launch import Launch

__all__ = ["RemoteCluster"]

_QUEUE_S = 1.0
"""How often a job that waits is looked after."""
_ALIVE_S = 2.0
"""How long an agent may take to answer when it cannot be reached over SSH, either."""


class RemoteCluster(AgentsCluster):
    """Starts agents on other hosts, and engines below them.

    Args:
        record: the session's, without slots: where ranks go depends on what the hosts say.
        launch: through what agents are started, and where.
        num_ranks: of all hosts together, if the launch does not say it.
        preload: modules that the engines import while they start.

    Raises:
        StartError: a host cannot be used, or what was started ended; the text names the fix.
    """

    def __init__(
        self,
        record: SessionRecord,
        launch: Launch,
        num_ranks: int | None = None,
        preload: Sequence[str] = (),
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        super().__init__(record, preload)
        self._launch = launch
        self.num_ranks: list[int | None] = launch.ranks_by_host(num_ranks)
        try:
            self._fleet = self._new_fleet()
        except BaseException:
            remove(self.dir)  # nothing was started yet
            raise
        self.post_guardian()
        try:
            self._start_agents(on_stage)
            begun_s = time.time()
            self.hosts: dict[int, HostFacts] = self._ask_hosts()
            self._clocks_s = (begun_s, time.time())
        except BaseException:
            self.stop()
            raise

    @classmethod
    def started(
        cls,
        record: SessionRecord,
        launch: Launch,
        wish: Wish,
        *,
        preload: Sequence[str],
        on_stage: Callable[[str], None],
    ) -> Self:
        """Start agents, look whether their hosts can train together, and start engines.

        Args:
            record: the session's, without slots.
            launch: through what, and where.
            wish: what the ranks are to have.
            preload: modules that the engines import while they start.
            on_stage: called with a short text as each stage of the start begins.

        Raises:
            InvalidInputError: the hosts lack what is asked for.
            StartError: the hosts cannot train together, or an engine did not come up.
        """
        cluster = cls(record, launch, wish.num_ranks, preload, on_stage)
        try:
            cluster.warnings = cluster.require_fitness()
            hosts = [cluster.hosts[number] for number in sorted(cluster.hosts)]
            slots = place(hosts, cluster.names, cluster.num_ranks, wish)
            hosts_word = "host" if len(hosts) == 1 else "hosts"
            on_stage(f"starting {len(slots)} engines on {len(hosts)} {hosts_word}")
            cluster.start_engines(slots, wish.backend)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @property
    def names(self) -> tuple[str, ...]:
        """What the user calls the hosts; else what they call themselves."""
        if self._fleet.names:
            return self._fleet.names
        hosts = [self.hosts[number].host for number in sorted(self.hosts)]
        return tuple(
            name if hosts.count(name) == 1 else f"{name}-{number}"
            for number, name in enumerate(hosts)
        )

    def _name(self, number: int) -> str:
        return self._fleet.names[number] if self._fleet.names else f"agent {number}"

    def _new_fleet(self) -> Fleet:
        if self._launch.engines == "ssh":
            return SshFleet(self._launch)
        if self._launch.engines == "mpi":
            return MpiFleet(self._launch, self.dir)
        if self._launch.engines == "profile":
            return ProfileFleet(self._launch, self.dir)
        log = Path(self.record.runs_dir) / f"slurm-{self.record.id}.log"
        return SlurmFleet(self._launch, self.dir, log, self.num_ranks[0])

    def check(self, for_s: float) -> HostCheck:
        """Look whether the hosts can train together.

        Args:
            for_s: how long each pair of them sends at full speed; 0: only the latency, and
                nothing for which torch must be loaded.
        """
        own = HostFacts.of_this_host("", "", folder="", has_folder=True)
        hosts = [self.hosts[number] for number in sorted(self.hosts)]
        problems = preflight.complaints([*hosts, own], [*self.names, "the notebook's host"])
        links = preflight.measure_links(self.agents, hosts, self.names, for_s)
        warnings = preflight.warnings(hosts, self.names, self._clocks_s)
        if for_s:
            warnings += preflight.without_peer_access(self.agents, hosts, self.names)
        return HostCheck(
            problems=(*problems, *preflight.unreached(links)),
            warnings=tuple(warnings),
            links=links,
        )

    def require_fitness(self) -> tuple[str, ...]:
        """Return what is better mended.

        Raises:
            StartError: the hosts cannot train together.
        """
        found = self.check(for_s=0.0)
        if found.problems:
            raise StartError("\n".join(found.problems))
        return found.warnings

    def start_engines(self, slots: tuple[Slot, ...], backend: str) -> None:
        """Start an engine for each slot, and wait until all are there.

        Raises:
            InvalidInputError: there is no such backend for these slots.
            StartError: an engine did not come up.
        """
        self.record: SessionRecord = replace(
            self.record, slots=tuple(map(asdict, slots)), backend=choose_backend(backend, slots)
        )
        self.record.write()
        self.watch_engines(Engines(self.agents.client, slots))
        self.start_on_agents([slot.engine for slot in slots])
        self.wait_registered([slot.rank for slot in slots])
        self.remember(self.starter.pids())  # now the controller has all of its own

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the session, on all hosts; safe to call twice."""
        self._is_stopping = True
        self._fleet.stop(self.close_agents())
        super().stop(is_hurried=is_hurried)

    def _start_agents(self, on_stage: Callable[[str], None]) -> None:
        wanted = self._launch.interface
        address = address_of(wanted) if wanted else self._fleet.own_address()
        on_stage(f"starting controller on {address}")
        self.starter.start_controller(
            [f"--ip={address}", "--IPController.enable_curve=True"], controller.__name__
        )
        self.remember(self.starter.pids())
        slots = [Slot(i, FIRST_ENGINE + i, 0, None, 1) for i in range(self._fleet.num_agents)]
        self.watch_agents(Engines(self.starter.connect(), slots))
        on_stage(f"reaching {', '.join(self._fleet.names) or 'the hosts'}")
        info = (self.dir / "security" / "ipcontroller-engine.json").read_text()
        options = {
            "session": self.record.id, "notebook_dir": str(Path.cwd()),
            "interface": wanted,
        }  # fmt: skip
        self._fleet.start(options, info, self._agent_may_have_ended, quiet_logger())
        self.remember(self._fleet.pids)
        self._wait_for_agents(address, on_stage)

    def _wait_for_agents(self, address: str, on_stage: Callable[[str], None]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        look_s = 0.0
        while missing := [i for i in self.agents.ranks if not self.agents.are_registered([i])]:
            if time.monotonic() > look_s:
                look_s = time.monotonic() + _QUEUE_S
                if waits := self._fleet.waits_for():
                    on_stage(waits)
                    deadline = time.monotonic() + START_TIMEOUT_S
            gone = [i for i in missing if i in self.agents.lost]
            if gone or time.monotonic() > deadline:
                number = (gone or missing)[0]
                msg = f"{self._name(number)}: {self._why_no_agent(number, address)}"
                raise StartError(msg)
            time.sleep(POLL_S)

    def _ask_hosts(self) -> dict[int, HostFacts]:
        answers = self.agents.control("facts", timeout_s=START_TIMEOUT_S)
        for number in self.agents.ranks:
            answer = answers.get(number, {"error": ": its agent does not answer"})
            if "error" in answer:
                msg = f"{self._name(number)}: {answer['error'].partition(': ')[2]}"
                raise StartError(msg)
        return {number: HostFacts.from_dict(answer) for number, answer in answers.items()}

    def _why_no_agent(self, number: int, address: str) -> str:
        log = self._fleet.log(number).strip()
        last = "\n".join(log.splitlines()[-8:])
        if "Registration timed out" in log:
            return (
                f"cannot reach this host at {address}: a firewall, or another network; "
                "--interface NAME takes another of this host's interfaces"
            )
        return f"its agent has not come up. Last lines of its log:\n{last}"

    def _agent_may_have_ended(self, number: int, *, is_certain: bool) -> None:
        """Take an agent for lost, unless it answers; called when its launcher has lost it."""
        if self._is_stopping or number in self.agents.lost:
            return
        answers: dict[int, Any] = {}
        if not is_certain and self.agents.are_registered([number]):
            answers = self.agents.control("ended", ranks=[number], timeout_s=_ALIVE_S)
        if not answers:
            self.agents.note_death(number, "its agent ended")
            self._agent_lost(number)
