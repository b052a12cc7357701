"""A run goes on when its kernel is gone; the next one finds it, sees all of it and stops it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest
from leaving import SAY_WHEN_IT_TRAINS, leave_in_a_run
from patience import wait_until
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

import dtkit
from dtkit.driver.runs.archive import runs
from dtkit.driver.waiting import drive
from dtkit.errors import ClusterDiedError, RankError
from dtkit.guard.processes import Identity, end
from dtkit.guard.record import RankRun, SessionRecord, find_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dtkit.driver.runs.run import Run

DRIVER = """
import sys
import dtkit
from dtkit.options import RunOptions
from dtkit.values import Lease

runs_dir, lease, cell = sys.argv[1:]
session = dtkit.Session.start(2, runs_dir=runs_dir, lease=Lease(float(lease)))
options = RunOptions(tensorboard="", timeline="")
run, steps = session.training(cell, name="lasting", options=options)
"""
DRIVER += SAY_WHEN_IT_TRAINS

CELL = """
import time
import torch
from pathlib import Path

print("begin", rank)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
is_over = torch.zeros(1)
while not is_over:
    optimizer.zero_grad()
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
    is_there = rank == 1 and Path({flag!r}).exists()  # one sees it: who fails is no matter of luck
    {if_there}
    is_over.fill_(is_there)
    dist.all_reduce(is_over, op=dist.ReduceOp.MAX)
    time.sleep(0.01)  # as slow as a larger model: the machine is for what is waited for
print("end", rank)
"""

WAIT_S = 60.0


class Left:
    """A session whose kernel was killed during a run."""

    def __init__(self, folder: Path, lease: float, if_there: str) -> None:
        self.flag = folder / "flag"
        self.runs = runs(folder)
        cell = CELL.format(flag=str(self.flag), if_there=if_there)
        self.id = leave_in_a_run(DRIVER, str(folder), str(lease), cell)

    @property
    def record(self) -> SessionRecord:
        (record,) = [record for record in find_records() if record.id == self.id]
        return record


@pytest.fixture
def leave(tmp_path: Path) -> Iterator[Callable[..., Left]]:
    """Start a session in a process of its own and kill that; nothing of it is left."""
    made: list[Left] = []

    def make(lease: float = 15.0, if_there: str = "pass") -> Left:
        made.append(Left(tmp_path, lease, if_there))
        return made[-1]

    yield make
    for left in made:
        if left.id in [orphan.id for orphan in dtkit.Session.orphans()]:
            dtkit.Session.end_orphan(left.id)
        wait_until(lambda: left.id not in [r.id for r in find_records()], "the folder's end")  # noqa: B023  called at once


def tensorboard_steps(run: Run) -> list[int]:
    """Return the steps of the loss curve that TensorBoard shows."""
    events = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(run.dir))
    return [point.step for point in events.Reload().Scalars("tensorboard", "train/loss")]


def test_the_next_kernel_sees_the_whole_run_and_stops_it(leave: Callable[..., Left]) -> None:
    left = leave()
    (orphan,) = [orphan for orphan in dtkit.Session.orphans() if orphan.id == left.id]
    assert (orphan.run, orphan.num_ranks, orphan.left_s) == ("lasting", 2, None)
    assert left.runs["lasting"].state == "running"
    with pytest.raises(dtkit.DtkitError, match=f"goes on: %dist_init --attach {left.id}, then %"):
        left.runs.delete("lasting")
    with dtkit.Session.attach(left.id) as session:
        processes = [Identity.of(pid) for pid in session.pids()]
        assert left.record.driver.pid == os.getpid()
        assert left.id not in [orphan.id for orphan in dtkit.Session.orphans()]
        with pytest.raises(dtkit.DtkitError, match="is open; %dist_shutdown"):
            dtkit.Session.attach(left.id)
        run = dtkit.last_run
        assert run is not None
        assert session.is_busy
        seen = run.view().step
        wait_until(lambda: run.view().step > seen, "another step")
        session.stop()
        run.wait(timeout_s=WAIT_S)
        assert run.state == "stopped"
        steps = run.history["step"].tolist()
        assert steps == list(range(1, len(steps) + 1))
        assert [run.output.text_of(rank) for rank in (0, 1)] == ["begin 0\n", "begin 1\n"]
        assert session.facts[1]["pid"] in session.pids()
        session.execute("dist.all_reduce(is_over)")
        assert left.runs["lasting"].state == "stopped"
        # One curve from the first step to the last; of a fast run not every point.
        shown = tensorboard_steps(run)
        assert shown == sorted(set(shown))
        assert (shown[0], shown[-1]) == (steps[0], steps[-1])
        trace = json.loads((run.dir / "timeline.json").read_text())
        assert f"step {steps[-1]:.0f}" in {event.get("name") for event in trace["traceEvents"]}
    assert not [process for process in processes if process and process.is_alive]


def test_a_failure_that_nobody_saw_is_told_and_the_others_are_freed(
    leave: Callable[..., Left],
) -> None:
    left = leave(if_there="assert not is_there, 'bad batch'")
    left.flag.touch()
    folder = left.record.dir
    wait_until(lambda: RankRun.read_all(folder)[1].state == "failed", "the failure")
    with dtkit.Session.attach(left.id) as session:
        run = dtkit.last_run
        assert run is not None
        with pytest.raises(RankError, match=r"rank 1: AssertionError: bad batch \(cell line") as e:
            run.wait(timeout_s=WAIT_S)
        assert "rank 0 was in all_reduce (cell line " in str(e.value)
        assert "and was released; group rebuilt; state kept" in str(e.value)
        session.execute("dist.all_reduce(is_over)")


def test_an_attached_session_replaces_a_dead_engine(
    leave: Callable[..., Left], owned_pids: set[int]
) -> None:
    left = leave()
    left.flag.touch()
    folder = left.record.dir
    wait_until(lambda: RankRun.read_all(folder)[1].state == "finished", "the end of the run")
    with dtkit.Session.attach(left.id) as session:
        wait_for_run()
        _, requests, steps = session.running("dist.all_reduce(is_over) if rank else dist.barrier()")
        os.kill(session.facts[1]["pid"], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1: EngineDied: its engine ended"):
            drive(steps, requests)
        assert "state of rank 0" in session.restart(refill=True)
        owned_pids.update(session.pids())
        assert session.execute("rank, model.weight.shape[1]").results[1] == "(1, 4)"
        session.execute("dist.all_reduce(is_over)")
        session.restart([0])
        owned_pids.update(session.pids())
        assert session.execute("'model' in globals()").results == {0: "False", 1: "True"}


def test_the_controller_of_an_attached_session_dies(leave: Callable[..., Left]) -> None:
    left = leave()
    left.flag.touch()
    folder = left.record.dir
    wait_until(lambda: RankRun.read_all(folder)[1].state == "finished", "the end of the run")
    session = dtkit.Session.attach(left.id)
    wait_for_run()
    processes = [Identity.of(pid) for pid in session.pids()]
    (controller,) = [p for p in map(psutil.Process, session.pids()) if is_controller(p)]
    controller.kill()
    wait_until(lambda: dtkit.current_session() is None, "the end of the session")
    with pytest.raises(ClusterDiedError, match="the cluster's controller ended; no engine can"):
        session.execute("rank")
    wait_until(lambda: not [p for p in processes if p and p.is_alive], "the processes")


def wait_for_run() -> None:
    run = dtkit.last_run
    assert run is not None
    run.wait(timeout_s=WAIT_S)


def is_controller(process: psutil.Process) -> bool:
    """Whether it is the controller's main process; its children have its command too."""
    parent = process.parent()
    name = "ipyparallel.controller"
    return name in process.cmdline() and (parent is None or name not in parent.cmdline())


def test_without_anybody_the_run_is_finished_and_then_everything_ends(
    leave: Callable[..., Left],
) -> None:
    left = leave(lease=0.0)
    record = left.record
    left.flag.touch()
    wait_until(lambda: not record.dir.exists(), "the end of the lease")
    assert not record.is_alive
    assert record.guardian is not None
    wait_until(lambda: not record.guardian.is_alive, "the guardian")
    run = left.runs["lasting"]
    assert run.state == "finished"
    assert run.output.text_of(1).endswith("end 1\n")


def test_engines_that_have_lost_kernel_guardian_and_controller_end_with_their_run(
    leave: Callable[..., Left],
) -> None:
    left = leave()
    record = left.record
    assert record.guardian is not None
    assert record.controller is not None
    end([record.guardian, record.controller], grace_s=0.0)
    wait_until(lambda: left.record.is_guarded, "another guardian, which an engine starts")
    assert [o.run for o in dtkit.Session.orphans() if o.id == left.id] == ["lasting"]
    left.flag.touch()
    wait_until(lambda: not record.dir.exists(), "the session's end")
    assert not record.is_alive
