"""One fault on real engines, and what came of it."""

from __future__ import annotations

import ast
import os
import signal
import textwrap
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import psutil
from faults import CELL, FAULTS, SETUP, VERIFY

import dtkit
from dtkit.errors import DtkitError, RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from faults import Fault

    from dtkit.driver.requests import Requests

__all__ = ["Growth", "Rig", "Trial"]

_HUNG_AFTER_S = 30.0
_POLL_S = 0.02
_MAX_STEP = 12
_JITTER_S = 0.5


@dataclass(slots=True)
class Trial:
    """What one fault led to.

    Attributes:
        kind: of fault.
        is_detected: whether the cell ended as such a fault ends a cell.
        release_s: from the fault to the last surviving rank's way out of the cell.
        usable_s: from the end of the cell until everything is verified.
        is_state_kept: whether names, group and equal replicas were there.
        is_hung: whether the cell did not end by what a user would do.
        num_innocent: engines that ended without being the fault's.
        text: how the cell ended.
    """

    kind: str
    is_detected: bool = False
    release_s: float | None = None
    usable_s: float = 0.0
    is_state_kept: bool = False
    is_hung: bool = False
    num_innocent: int = 0
    text: str = ""


@dataclass(slots=True)
class Growth:
    """Descriptors, threads and memory of one process, measured after each fault."""

    amounts: list[tuple[float, float, float]] = field(default_factory=list)
    """(num_faults, 3): number, number, MiB."""

    def note(self, process: psutil.Process) -> None:
        """Take a measurement."""
        rss_mib = process.memory_info().rss / 2**20
        self.amounts.append((process.num_fds(), process.num_threads(), rss_mib))


@dataclass(slots=True)
class Rig:
    """A session that goes through one fault after another."""

    session: dtkit.Session
    rng: random.Random
    mark: Path
    growth: dict[int, Growth] = field(default_factory=dict)

    @classmethod
    def start(cls, num_ranks: int, rng: random.Random, folder: Path) -> Rig:
        """Start the engines and prepare what the faults need."""
        session = dtkit.Session.start(num_ranks, devices="cpu", runs_dir=folder / "runs")
        mark = folder / "mark"
        session.execute(SETUP.replace("{mark!r}", repr(str(mark))))
        return cls(session, rng, mark)

    def run(self, kind: str) -> Trial:
        """Let a fault happen, repair what the user would have to, and verify."""
        fault, trial = FAULTS[kind], Trial(kind)
        rank = self.rng.randrange(self.session.world_size)
        before = self._pids()
        self.mark.unlink(missing_ok=True)
        times_s = self._drive(fault, rank, trial)
        if self.mark.exists():
            times_s = [float(self.mark.read_text())]
        ended_s = time.monotonic()
        self._verify(trial, rank, times_s)
        trial.usable_s = time.monotonic() - ended_s
        changed = {r for r, pid in self._pids().items() if pid != before[r]}
        ends_rank = fault.ends_rank or fault.ends == "died"
        trial.num_innocent = len(changed - ({rank} if ends_rank else set()))
        if not trial.is_state_kept and self.session._engines.lost:  # noqa: SLF001
            self.session.restart(refill=True)  # for the next one
        # What is garbage is no leak; engines collect it when they next allocate much.
        self.session.execute("import gc; gc.collect(); None")
        for pid in (os.getpid(), *self._pids().values()):
            self.growth.setdefault(pid, Growth()).note(psutil.Process(pid))
        return trial

    def _drive(self, fault: Fault, rank: int, trial: Trial) -> list[float]:
        """See the cell to its end; return when the acts were done, Unix times in seconds."""
        body = fault.body.replace("{step}", str(self.rng.randint(0, _MAX_STEP)))
        cell = CELL.replace("{rank}", str(rank)).replace(
            "{body}", textwrap.indent(body.strip("\n"), "    ")
        )
        if fault.is_run:
            run, steps = self.session.training(cell, options=RunOptions(on_nan="stop"))
            requests = run.requests
        else:
            _, requests, steps = self.session.running(cell)
        times_s = [at_s + self.rng.random() * _JITTER_S for at_s, _ in fault.acts]
        # In their order: a rank that is suspended when it has left the cell is another fault.
        acts = list(zip(accumulate(times_s, max), (act for _, act in fault.acts), strict=True))
        deeds = _Deeds(self.session, requests, acts, rank)
        try:
            for _ in steps:
                trial.is_hung |= deeds.do_due()
                requests.alarm.wait(_POLL_S)
            trial.is_detected = fault.ends == "stopped"
        except RankError as error:
            trial.text = str(error)
            ename = {"raised": fault.ename, "died": "EngineDied"}.get(fault.ends)
            trial.is_detected = [(f.rank, f.ename) for f in error.causes] == [(rank, ename)]
        except DtkitError as error:
            trial.text = str(error)
        return deeds.times_s

    def _verify(self, trial: Trial, rank: int, times_s: list[float]) -> None:
        session = self.session
        try:
            lost = session._engines.lost  # noqa: SLF001  what a user reads in the error
            alive = [r for r in session.ranks if r not in lost]
            trial.release_s = self._release_s([r for r in alive if r != rank] or alive, times_s)
            if lost:
                session.restart(refill=True)
            answers = session.execute("'kept' in globals()").results
            empty = [r for r, text in answers.items() if text == "False"]
            if empty:  # new engines, in the place of those that answered nothing
                session.restart(empty, refill=True)
            found = set(session.execute(VERIFY).results.values())
            trial.is_state_kept = len(found) == 1 and f"({session.world_size}," in found.pop()
        except DtkitError as error:
            trial.text += f"\nnot usable: {error}"

    def _release_s(self, ranks: list[int], times_s: list[float]) -> float | None:
        answers = self.session.execute("globals().get('freed_s')", ranks=ranks).results
        freed_s = [float(ast.literal_eval(t)) for t in answers.values() if t != "None"]
        # Of several acts the last before it is what freed them.
        before_s = [at_s for at_s in times_s if freed_s and at_s <= max(freed_s)]
        return max(freed_s) - max(before_s) if before_s else None

    def _pids(self) -> dict[int, int]:
        return {rank: fact["pid"] for rank, fact in self.session.facts.items()}


@dataclass(slots=True)
class _Deeds:
    """What the driver does to a cell, when it is due."""

    session: dtkit.Session
    requests: Requests
    acts: list[tuple[float, str]]
    rank: int
    begun_s: float | None = None
    times_s: list[float] = field(default_factory=list)

    def do_due(self) -> bool:
        """Do what is due; return whether the cell goes on for much too long."""
        if self.begun_s is None:
            places = self.session._engines.control("where").values()  # noqa: SLF001
            if any(place.get("state") != "idle" for place in places):
                self.begun_s = time.monotonic()  # now: who holds the GIL does not answer for long
            return False
        now_s = time.monotonic()
        if self.acts and now_s >= self.begun_s + self.acts[0][0]:
            self._do(self.acts.pop(0)[1])
        is_hung = now_s > self.begun_s + _HUNG_AFTER_S
        if is_hung:
            self.requests.interrupt()
            time.sleep(1.0)
        return is_hung

    def _do(self, act: str) -> None:
        if act != "suspend":  # it frees nobody
            self.times_s.append(time.time())
        pid = self.session.facts[self.rank]["pid"]
        if act == "press":
            self.requests.interrupt()
        elif act == "now":
            self.requests.stop_now()
        elif act == "suspend":
            os.kill(pid, signal.SIGSTOP)
        else:
            os.kill(pid, signal.SIGKILL)
