"""An engine dies, the controller dies: it is said how, the rest goes on, nothing waits for ever."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
from typing import TYPE_CHECKING

import pytest
from patience import wait_until
from test_faults import SETUP

from dtkit.driver.registry import current_session
from dtkit.errors import ClusterDiedError, EngineDiedError, RankError, StartError
from dtkit.guard.processes import Identity
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dtkit

DIES = "import os, signal, ctypes, time\nif rank == 1: {}\ndist.all_reduce(torch.ones(1))"
WAYS = {
    "os.kill(os.getpid(), signal.SIGKILL)": "was killed by SIGKILL",
    "ctypes.string_at(0)": "was killed by SIGSEGV",
    "os._exit(3)": "ended with exit code 3",
}


@pytest.fixture(scope="module")
def session3(start_session: object) -> dtkit.Session:
    """Three ranks that train a DistributedDataParallel model."""
    session: dtkit.Session = start_session(3)  # type: ignore[operator]
    session.execute(SETUP)
    return session


def exhaust(steps: Iterator[None]) -> None:
    for _ in steps:
        threading.Event().wait(0.01)


def alive(pids: list[int]) -> list[Identity]:
    return [found for pid in pids if (found := Identity.of(pid))]


def wait_for_the_end(processes: list[Identity]) -> None:
    """Wait until they have ended; whether their parents have looked is no matter."""
    wait_until(lambda: not any(process.is_alive for process in processes), lambda: processes)


def own(session: dtkit.Session, owned_pids: set[int]) -> None:
    """Count the new engines' processes as the session's."""
    owned_pids.update(session.pids())


@pytest.mark.parametrize("how", WAYS)
def test_a_dead_rank_is_named_and_comes_back_with_its_state(
    session3: dtkit.Session, owned_pids: set[int], how: str
) -> None:
    before = session3.execute("train()").results
    with pytest.raises(RankError) as caught:
        session3.execute(DIES.format(how))
    (cause,) = caught.value.causes
    assert (cause.rank, cause.ename) == (1, "EngineDied")
    assert WAYS[how] in cause.evalue
    if "SIGSEGV" in WAYS[how]:
        assert "Segmentation fault" in cause.evalue
    assert "%dist_restart 1" in caught.value.epilogue
    assert session3.execute("kept", ranks=[0, 2]).results == {0: "10", 2: "12"}
    with pytest.raises(EngineDiedError, match="%dist_restart 1"):
        session3.execute("rank")
    said = session3.restart(refill=True)
    own(session3, owned_pids)
    assert "state of rank 0" in said
    assert "optimizer" in said
    assert session3.execute("rank, kept").results[1] == "(1, 10)"
    after = session3.execute("train()").results
    assert len(set(after.values())) == 1
    assert set(after.values()) != set(before.values())


def test_a_run_can_restart_by_itself(session3: dtkit.Session, owned_pids: set[int]) -> None:
    cell = DIES.format("os._exit(1)")
    with pytest.raises(RankError, match="rank 1: new engine with the"):
        session3.train(cell, options=RunOptions(auto_restart=True))
    own(session3, owned_pids)
    assert len(set(session3.execute("train()").results.values())) == 1


def test_an_engine_that_answers_nothing_is_replaced(
    session3: dtkit.Session, owned_pids: set[int]
) -> None:
    os.kill(session3.facts[1]["pid"], signal.SIGSTOP)
    assert "state of rank 0" in session3.restart([1], refill=True)
    own(session3, owned_pids)
    assert len(set(session3.execute("train()").results.values())) == 1


def test_an_engine_is_replaced_also_when_the_sessions_folder_is_gone(
    session3: dtkit.Session, owned_pids: set[int]
) -> None:
    folder = session3._cluster.dir
    shutil.rmtree(folder)
    folder.touch()
    before = session3.facts[1]["pid"]
    with pytest.raises(StartError, match="cannot be put back"):
        session3.restart([1], refill=True)
    session3.reset_group()
    assert session3.execute("kept").results[1] == "10"  # who cannot be replaced is not ended
    folder.unlink()
    session3.restart([1], refill=True)
    own(session3, owned_pids)
    assert session3.facts[1]["pid"] != before
    assert len(set(session3.execute("train()").results.values())) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.glob("security/ipc*.json")} == {0o600}


def test_the_controller_dies_while_a_cell_runs(session3: dtkit.Session) -> None:
    processes = alive(session3.pids())
    _, _, steps = session3.running("dist.recv(torch.ones(1), src=(rank + 1) % 3)")
    next(steps)
    os.kill(session3._cluster.starter.controller_pid, signal.SIGKILL)
    with pytest.raises(ClusterDiedError, match="controller was killed by SIGKILL"):
        exhaust(steps)
    wait_for_the_end(processes)
    with pytest.raises(ClusterDiedError, match="%dist_init starts anew"):
        session3.execute("rank")


def test_the_controller_dies_while_nothing_runs(start_session: object) -> None:
    session: dtkit.Session = start_session(2)  # type: ignore[operator]
    processes = alive(session.pids())
    os.kill(session._cluster.starter.controller_pid, signal.SIGKILL)
    wait_for_the_end(processes)
    with pytest.raises(ClusterDiedError, match="controller was killed by SIGKILL"):
        session.execute("rank")
    session.close()  # when it is through, the session has let go of everything
    assert current_session() is None
