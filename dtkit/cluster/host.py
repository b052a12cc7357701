"""HostCluster: the processes of a session on this host, whoever started them."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from dtkit.cluster.deaths import end_session, exit_text, last_words, num_oom_kills
from dtkit.cluster.holding import interrupt_held
from dtkit.cluster.placement import Slot
from dtkit.cluster.starter import Starter
from dtkit.errors import StartError
from dtkit.guard.posting import post
from dtkit.guard.processes import Identity, end, family
from dtkit.guard.record import SessionRecord, remove, restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from dtkit.cluster.engines import Engines

__all__ = ["HostCluster"]

_STOP_TIMEOUT_S = 2.0
_LOG_LINES = 20
_CRASH_LINES = 200
POLL_S = 0.02
START_TIMEOUT_S = 120.0


class HostCluster:
    """Knows every process of a session by pid and start time, and ends them.

    Args:
        record: the session's; what changes in it is written down at once.
        preload: modules that engines import while they start.
    """

    engines: Engines
    on_breakdown: Callable[[], None]
    """Called, on a thread of its own, when the engines cannot be reached any more."""

    guardian_module = "dtkit.guard"
    warnings: tuple[str, ...] = ()
    """What was found at the start that is better mended, each with its fix."""

    def __init__(self, record: SessionRecord, preload: Sequence[str] = ()) -> None:
        self.on_breakdown = self.stop
        self.record: SessionRecord = record
        self._preload = preload
        self._is_stopping = False
        self._num_oom_kills = num_oom_kills()
        self.keys: dict[str, bytes] = {}
        """What the session's folder is put back with, if somebody removes it."""
        record.write()

    @cached_property
    def starter(self) -> Starter:
        """What starts processes of the session here."""
        return Starter(
            self.dir,
            self.slots,
            preload=self._preload,
            on_engine_exit=self._on_engine_exit,
            on_controller_exit=self._on_controller_exit,
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where each rank lives."""
        return tuple(Slot(**slot) for slot in self.record.slots)

    @property
    def dir(self) -> Path:
        """The session's folder: keys, logs, and its record."""
        return self.record.dir

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the session and remove its folder; safe to call twice.

        Args:
            is_hurried: kill at once. An engine in a collective does not hear a
                SIGTERM, and a notebook that is being shut down has two seconds
                before it is killed itself.
        """
        self._is_stopping = True
        with interrupt_held():
            self.remember(self.starter.pids())
            self.leave()
            # A SIGTERM lets engines run their exit handlers; what is then still there
            # is killed. The guardian goes last: until then it would finish this for us.
            end(family(self.record.processes), grace_s=0.0 if is_hurried else _STOP_TIMEOUT_S)
            guardian = self.record.guardian
            if guardian is not None:
                end([guardian], grace_s=0.0)
            remove(self.dir)

    def replace(self, ranks: Sequence[int]) -> None:
        """End the engines of these ranks if they live, and start new ones under the same ids.

        Raises:
            StartError: a new engine ended or did not come up in time.
        """
        engines = [slot.engine for slot in self.slots if slot.rank in ranks]
        self._restore_folder()  # first: who cannot be replaced is not ended
        end([found for e in engines if (found := self._engine(e)) is not None], grace_s=0.0)
        deadline = time.monotonic() + START_TIMEOUT_S
        # A new engine gets the id only when the controller has forgotten the old one.
        while not self.engines.are_gone(ranks):
            self._check_alive(deadline, ())
            time.sleep(POLL_S)
        for engine in engines:
            self.starter.start_again(engine)
        while not self.engines.are_registered(ranks):
            self._check_alive(deadline, engines)
            time.sleep(POLL_S)
        self.remember(self.starter.pids())
        self.engines.note_return(ranks)

    def bring_files(self, folder: Path, *, is_over: bool = True) -> None:
        """Bring what ranks on other hosts have written of a run; here there are none."""

    def leave(self) -> None:
        """Disconnect; the session lives on for its lease."""
        if hasattr(self, "engines"):
            self.engines.close()

    def remember(self, pids: Iterable[int]) -> None:
        """Write down that these processes, and those below them, belong to the session."""
        found = family(filter(None, map(Identity.of, pids)))
        known = {i: None for i in (*self.record.processes, *found) if i.is_alive}
        pid = self.starter.controller_pid
        controller = self.record.controller or (Identity.of(pid) if pid else None)
        self.record = replace(self.record, processes=tuple(known), controller=controller)
        # The session has ended already, or its folder takes nothing any more: a full disk.
        with contextlib.suppress(OSError):
            self.record.write()

    def pids(self) -> list[int]:
        """Return the pids of every live process of the session, children included."""
        guardian = self.record.guardian
        roots = (*self.record.processes, *((guardian,) if guardian else ()))
        return [process.pid for process in family(roots)]

    def log_tail(self, engine: int, num_lines: int = _LOG_LINES) -> str:
        """Return the last lines of an engine's log."""
        logs = sorted((self.dir / "log").glob(f"ipengine-*-{engine}.log"))
        text = "".join(path.read_text(errors="replace") for path in logs)
        return "\n".join(text.splitlines()[-num_lines:])

    def _restore_folder(self) -> None:
        """Put the session's folder back if somebody has removed it, as who cleans up /tmp does.

        Raises:
            StartError: it cannot be.
        """
        try:
            restore(self.dir, self.keys)
            if SessionRecord.read(self.dir) is None:
                self.record.write()
            if not self.record.is_guarded:
                self.post_guardian()
        except OSError as error:
            msg = (
                f"the session's folder {self.dir} is gone or damaged and cannot be put back: "
                f"{error}. No new engine can start; pull what you need, then %dist_shutdown"
            )
            raise StartError(msg) from error

    def _engine(self, engine: int) -> Identity | None:
        """Return the process of an engine, whoever started it; None if it has ended."""
        for process in self.record.processes:
            with contextlib.suppress(psutil.Error):
                command = psutil.Process(process.pid).cmdline()
                if f"--IPEngine.id={engine}" in command and process.is_alive:
                    return process
        return None

    def _on_engine_exit(self, engine: int, code: int) -> None:
        self._engine_ended(engine, self.starter.pid_of(engine), code)

    def _engine_ended(self, engine: int, pid: int, code: int | None = None) -> None:
        if self._is_stopping or not hasattr(self, "engines"):
            return
        before, self._num_oom_kills = self._num_oom_kills, num_oom_kills()
        how = exit_text(code, (before, self._num_oom_kills))
        rank = next(slot.rank for slot in self.slots if slot.engine == engine)
        log = last_words(self.log_tail(engine, _CRASH_LINES))
        words = f". Last lines of its log:\n{log}" if log else ""
        self.engines.note_death(rank, f"its engine {how}{words}")
        end_session(pid)

    def _on_controller_exit(self, code: int) -> None:
        self._break_down(exit_text(code))

    def _break_down(self, how: str) -> None:
        """End everything: the controller has ended."""
        if self._is_stopping or not hasattr(self, "engines"):
            return
        self.engines.note_breakdown(
            f"the cluster's controller {how}; no engine can be reached without it, so "
            "all were ended and what lived on them is gone. %dist_init starts anew"
        )
        self.on_breakdown()

    def _check_alive(self, deadline: float, starting: Sequence[int]) -> None:
        gone = [engine for engine in starting if not self.starter.is_running(engine)]
        if not gone and time.monotonic() < deadline:
            return
        what = f"engine {gone[0]} ended" if gone else f"no answer in {START_TIMEOUT_S:.0f} s"
        msg = f"the engines did not start: {what}. Last lines of its log:\n" + self.log_tail(
            gone[0] if gone else 0
        )
        raise StartError(msg)

    def post_guardian(self) -> None:
        """Start the process that ends the session if its driver goes and nobody comes."""
        guardian = post(self.dir, self.guardian_module)
        self.record = replace(self.record, guardian=guardian)
        self.record.write()
