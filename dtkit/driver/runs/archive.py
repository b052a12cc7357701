"""Runs on disk: every run's folder read back, listed, compared, deleted.

A folder tells all of a run: `run.json`, `cell.py` and one `rank-<R>.jsonl` of
events per rank, which the ranks write themselves. So a run can be read back also
if its kernel was killed, and while it goes on.
"""

from __future__ import annotations

import contextlib
import heapq
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dtkit.driver.registry import current_session, last_run
from dtkit.driver.runs.followed import replay_output
from dtkit.driver.runs.run import Run
from dtkit.driver.runs.rundir import read_facts
from dtkit.errors import InvalidInputError, did_you_mean
from dtkit.events import OVER, LogBatch, Note, RankEnded, StepBatch, decode
from dtkit.guard.record import RankRun, find_records
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from dtkit.events import Event
    from dtkit.values import RunFacts
    from dtkit.views.comparison import Comparison

__all__ = ["Runs", "load", "open_run", "runs"]

_TAIL_BYTES = 65_536
_CUT_SHORT = "the run has no end: its kernel or its engines were gone before it ended"


class Runs(Mapping[str, Run]):
    """The runs of a folder, the newest first: `runs()["first"]` reads one back.

    Args:
        folder: where each run has its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Run:
        return load(self._find(name))

    def __iter__(self) -> Iterator[str]:
        return (facts.name for facts in self.facts())

    def __len__(self) -> int:
        return len(self.facts())

    def facts(self) -> list[RunFacts]:
        """Return what is known of each run, without reading all of its events; the newest first."""
        found = []
        for path in self.folder.glob("*/run.json"):
            with contextlib.suppress(InvalidInputError):  # one that is broken hides no other
                found.append(_as_now(read_facts(path.parent)))
        return sorted(found, key=lambda facts: (facts.start_unix_s, facts.name), reverse=True)

    def newest_running(self) -> Run | None:
        """Return the newest run that goes on, whichever kernel drives it; None: there is none."""
        for facts in self.facts():
            if facts.state == "running":
                return load(facts.dir)
        return None

    def delete(self, *names: str) -> None:
        """Remove the folders of runs, with everything in them.

        Raises:
            InvalidInputError: there is no such run, or one goes on: nothing is removed then. Or a
                folder cannot be removed.
        """
        folders = [self._find(name) for name in names]
        for folder in folders:
            holder = _session_of(folder)
            if holder or _has_driver(read_facts(folder)):
                first = f"%dist_init --attach {holder}, then " if holder else ""
                msg = f"run {folder.name!r} goes on: {first}%dist_stop ends it, then delete it"
                raise InvalidInputError(msg)
        for folder in folders:
            try:
                shutil.rmtree(folder)
            except OSError as error:  # another user's, or on a file system that is read-only
                msg = f"run {folder.name!r} cannot be removed: {error}"
                raise InvalidInputError(msg) from None

    def compare(self, *names: str) -> Comparison:
        """Return runs side by side: their curves in one picture, and in what they differ.

        Raises:
            InvalidInputError: there is no such run.
        """
        from dtkit.views.comparison import Comparison  # draws: loads matplotlib when shown

        found = [self._find(name) for name in dict.fromkeys(names)]
        return Comparison([(read_facts(folder), load(folder).history) for folder in found])

    def _find(self, name: str) -> Path:
        names = [path.parent.name for path in self.folder.glob("*/run.json")]
        if name not in names:
            hint = did_you_mean(name, names) or "%dist_runs lists them"
            msg = f"no run {name!r} in {self.folder}; {hint}"
            raise InvalidInputError(msg)
        return (self.folder / name).resolve()

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        from dtkit.views.runstable import runs_bundle

        return runs_bundle(str(self.folder), self.facts())

    def __repr__(self) -> str:
        return f"Runs({str(self.folder)!r}: {', '.join(self) or 'none'})"


def runs(folder: str | Path | None = None) -> Runs:
    """Return the runs on disk; they outlive their session and their kernel.

    Args:
        folder: where each run has its folder; None: the open session's, else `dtkit_runs`.
    """
    session = current_session()
    if folder is None:
        folder = session.runs_dir if session is not None else "dtkit_runs"
    return Runs(Path(folder).expanduser())


def load(folder: str | Path) -> Run:
    """Read a run back from its folder: its curve, its notes, its summary.

    A run of this kernel that goes on, or was the last one, is returned itself.

    Raises:
        InvalidInputError: the folder holds no run.
    """
    folder = Path(folder).resolve()
    live = last_run()
    if live is not None and live.dir == folder:
        return live
    facts = read_facts(folder)
    run = open_run(facts)
    ended: dict[int, str] = {}
    last_s = facts.elapsed_s
    for time_s, event in _events(folder, facts.ranks):
        run.replay(event)
        last_s = max(last_s, time_s)
        if isinstance(event, RankEnded):
            ended[event.rank] = event.state
    replay_output(run)
    for note in facts.notes:
        run.replay(Note(facts.ranks[0], note))
    run.driven = "elsewhere" if _has_driver(facts) else "by nobody"
    if run.driven == "by nobody" and not _session_of(folder):
        state, error = _ending(facts, ended)
        run.replay_end(state, error, facts.start_unix_s + last_s)
    return run


def open_run(facts: RunFacts) -> Run:
    """Return a run without what it has recorded so far."""
    return Run(
        facts.name,
        _text(facts.dir / "cell.py"),
        facts.dir,
        recipe=Recipe(**_known(Recipe, facts.recipe)),
        options=RunOptions(**_known(RunOptions, facts.options)),
        ranks=facts.ranks,
        environment=facts.environment,
        start_unix_s=facts.start_unix_s,
    )


def _session_of(folder: Path) -> str:
    """Return the session without a kernel where the run goes on; empty if it does in none."""
    for record in find_records():
        for run in RankRun.read_all(record.dir).values():
            is_there = Path(run.dir) == folder and run.state == "running"
            if is_there and record.is_orphan and run.process.is_alive:
                return record.id
    return ""


def _has_driver(facts: RunFacts) -> bool:
    """Return whether the run is not over and the kernel that drives it is alive."""
    if facts.state in OVER:
        return False
    try:
        process = psutil.Process(facts.driver["pid"])
        return abs(process.create_time() - float(facts.driver["start_unix_s"])) < 1.0
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _as_now(facts: RunFacts) -> RunFacts:
    """Return a run's facts as they are by now: `run.json` is written at its begin and its end."""
    if facts.state in OVER:
        return facts
    newest = [_newest(facts.dir / f"rank-{rank}.jsonl") for rank in facts.ranks]
    num_steps = min(step for step, _ in newest)
    if _has_driver(facts) or _session_of(facts.dir):
        elapsed_s = max(0.0, time.time() - facts.start_unix_s)
        return replace(facts, state="running", num_steps=num_steps, elapsed_s=elapsed_s)
    ended = {rank: state for rank, (_, state) in zip(facts.ranks, newest, strict=True) if state}
    state, error = _ending(facts, ended)
    return replace(facts, state=state, error=error, num_steps=num_steps)


def _newest(path: Path) -> tuple[int, str]:
    """Return the newest step that a rank has written, and how it ended, from its file's end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:  # it has written nothing yet
        return 0, ""
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError):  # cut by the seek, or half written
            event = decode(line)
            if isinstance(event, RankEnded):
                return event.num_steps, event.state
            if isinstance(event, StepBatch) and event.columns["step"]:
                return int(event.columns["step"][-1]), ""
    return 0, ""


def _ending(facts: RunFacts, ended: dict[int, str]) -> tuple[str, str | None]:
    """Return how a run ended: as its kernel wrote it, else as its ranks did."""
    if facts.state in OVER:
        return facts.state, facts.error
    states = set(ended.values())
    if len(ended) < len(facts.ranks):
        return "failed", _CUT_SHORT
    return next(s for s in ("failed", "stopped", "finished") if s in states), facts.error


def _events(folder: Path, ranks: tuple[int, ...]) -> Iterator[tuple[float, Event]]:
    """Yield the events of all ranks, with their time, in the order of time.

    As they once came: steps are merged while all ranks are near each other.
    """
    streams = [_events_of(folder / f"rank-{rank}.jsonl") for rank in ranks]
    yield from heapq.merge(*streams, key=lambda found: found[0])


def _events_of(path: Path) -> Iterator[tuple[float, Event]]:
    now_s = 0.0
    try:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    event = decode(line)
                except (ValueError, KeyError):
                    continue  # cut short by a kill, or of another version
                now_s = max(now_s, _time_s(event))
                yield now_s, event
    except FileNotFoundError:  # the rank never began
        return


def _time_s(event: Event) -> float:
    if isinstance(event, StepBatch):
        return max(event.columns["time_s"], default=0.0)
    if isinstance(event, LogBatch):
        return max(event.time_s, default=0.0)
    return event.time_s if isinstance(event, RankEnded) else 0.0


def _known(cls: type[Recipe | RunOptions], values: dict[str, Any]) -> dict[str, Any]:
    """Return what this version knows of values that another may have written."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
