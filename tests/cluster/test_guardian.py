"""When a session without a kernel ends, and what is ended with it: the guardian's decisions."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from patience import wait_until

from dtkit.cluster import AttachedCluster
from dtkit.driver.orphans import choose_orphan, end_orphan, list_orphans
from dtkit.errors import InvalidInputError, StartError
from dtkit.guard import record as records
from dtkit.guard.__main__ import Guardian
from dtkit.guard.posting import post, post_again
from dtkit.guard.processes import Identity, end
from dtkit.guard.record import RankRun, SessionRecord, active_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEASE_S = 100.0


@pytest.fixture
def spawn() -> Iterator[Callable[[], Identity]]:
    """Start a process that stands for a kernel or an engine."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> Identity:
        started.append(subprocess.Popen(["sleep", "600"]))
        return identity(started[-1].pid)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def record(
    tmp_path: Path, spawn: Callable[[], Identity], monkeypatch: pytest.MonkeyPatch
) -> SessionRecord:
    """A session of one engine whose kernel runs."""
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / "dtkit-abc"
    folder.mkdir(mode=0o700)
    made = SessionRecord(
        dir=folder, slots=({"rank": 0},), backend="gloo", runs_dir=str(tmp_path), lease_s=LEASE_S,
        is_strict=False, owner="", driver=spawn(), processes=(spawn(),),
    )  # fmt: skip
    made.write()
    return made


def identity(pid: int) -> Identity:
    found = Identity.of(pid)
    assert found is not None
    return found


def kill(process: Identity) -> None:
    end([process], grace_s=0.0)


def train(record: SessionRecord, rank: int = 0, state: str = "running") -> None:
    """Write what a rank of a run on ranks 0 and 1 writes."""
    RankRun(
        rank=rank, ranks=(0, 1), process=record.processes[0], dir="/runs/first",
        start_unix_s=0.0, state=state,
    ).write(record.dir)  # fmt: skip


def test_nothing_ends_while_the_kernel_runs(record: SessionRecord) -> None:
    guardian = Guardian(record.dir)
    assert not guardian.look(0.0)
    assert not guardian.look(10 * LEASE_S)
    assert record.is_alive
    assert list_orphans() == ()


def test_the_session_ends_when_its_lease_has_run_out(record: SessionRecord) -> None:
    guardian = Guardian(record.dir)
    kill(record.driver)
    assert not guardian.look(0.0)
    assert list_orphans()[0].id == "abc"
    assert not guardian.look(LEASE_S - 1)
    assert record.is_alive
    assert guardian.look(LEASE_S)
    assert not record.is_alive
    assert not record.dir.exists()
    assert guardian.look(LEASE_S)


def test_who_cleans_up_the_folder_ends_no_session(record: SessionRecord) -> None:
    guardian = Guardian(record.dir)
    assert not guardian.look(0.0)
    records.remove(record.dir)
    assert not guardian.look(1.0)
    records.restore(record.dir, {})
    record.write()
    assert not guardian.look(2.0)
    records.remove(record.dir)
    record.dir.touch()  # something else has its name
    kill(record.driver)
    assert not guardian.look(3.0)
    assert not guardian.look(2.0 + LEASE_S)
    assert record.is_alive
    assert guardian.look(3.0 + LEASE_S)
    assert not record.is_alive


def test_whoever_takes_it_over_in_time_keeps_it(
    record: SessionRecord, spawn: Callable[[], Identity]
) -> None:
    guardian = Guardian(record.dir)
    kill(record.driver)
    assert not guardian.look(0.0)
    taken = replace(record, driver=spawn())
    taken.write()
    assert not guardian.look(2 * LEASE_S)
    kill(taken.driver)
    assert not guardian.look(2 * LEASE_S + 1)  # the lease begins anew
    assert not guardian.look(3 * LEASE_S)
    assert guardian.look(3 * LEASE_S + 1)


def test_the_lease_waits_while_a_run_goes_on(record: SessionRecord) -> None:
    guardian = Guardian(record.dir)
    train(record, 0)
    train(record, 1)
    kill(record.driver)
    assert active_ranks(record.dir) == {0, 1}
    for now_s in (0.0, LEASE_S, 10 * LEASE_S):
        assert not guardian.look(now_s)
    assert record.is_alive
    # One rank has failed, the other waits for it in vain: nobody trains any more.
    train(record, 1, "failed")
    assert not guardian.look(10 * LEASE_S + 1)
    assert guardian.look(11 * LEASE_S + 1)


def test_a_strict_lease_runs_out_during_a_run(record: SessionRecord) -> None:
    replace(record, is_strict=True).write()
    guardian = Guardian(record.dir)
    train(record, 0)
    train(record, 1)
    kill(record.driver)
    assert not guardian.look(0.0)
    assert guardian.look(LEASE_S)
    assert not record.is_alive


def test_without_its_controller_nobody_can_take_it_over(
    record: SessionRecord, spawn: Callable[[], Identity]
) -> None:
    controller, scheduler = spawn(), spawn()
    processes = (*record.processes, controller, scheduler)
    replace(record, controller=controller, processes=processes).write()
    guardian = Guardian(record.dir)
    train(record, 0)
    train(record, 1)
    kill(controller)  # and not what it had started
    assert not guardian.look(0.0)  # the kernel sees to it
    kill(record.driver)
    assert not guardian.look(1.0)  # what the run writes is of use
    (orphan,) = list_orphans()
    assert orphan.is_headless
    assert orphan.num_processes == 2
    with pytest.raises(StartError, match="its controller has ended: %dist_orphans --end abc"):
        AttachedCluster(record.dir)
    train(record, 0, "finished")
    assert guardian.look(2.0)
    assert not scheduler.is_alive
    assert not record.is_alive


def posted(record: SessionRecord) -> tuple[Identity, int]:
    """Start a guardian that has begun to watch; with a descriptor that tells of its end."""
    with records.locked(record.dir):  # its first look waits; between looks it blocks no signal
        guardian = post(record.dir)
        assert guardian is not None
        replace(record, guardian=guardian).write()
        is_ready = f"SigBlk:\t{1 << (signal.SIGTERM - 1):016x}"
        status = Path(f"/proc/{guardian.pid}/status")
        wait_until(lambda: is_ready in status.read_text(), "the guardian, which watches")
    return guardian, os.pidfd_open(guardian.pid)


def wait_for_end(guardian: Identity, descriptor: int) -> None:
    with os.fdopen(descriptor):
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
    assert not guardian.is_alive


def test_a_guardian_that_is_told_to_end_ends_what_no_kernel_has(record: SessionRecord) -> None:
    train(record, 0)
    train(record, 1)
    guardian, descriptor = posted(record)
    os.kill(record.driver.pid, signal.SIGTERM)
    os.kill(guardian.pid, signal.SIGTERM)
    wait_for_end(guardian, descriptor)
    assert not record.is_alive
    assert not record.dir.exists()


def test_a_guardian_that_is_told_to_end_leaves_a_kernel_its_session(
    record: SessionRecord,
) -> None:
    guardian, descriptor = posted(record)
    os.kill(guardian.pid, signal.SIGTERM)
    wait_for_end(guardian, descriptor)
    assert record.is_alive
    assert not post_again(record.dir)  # there is no need
    kill(record.driver)
    assert post_again(record.dir)
    assert not post_again(record.dir)
    (orphan,) = list_orphans()
    assert orphan.has_guardian
    end_orphan("abc")


def test_a_process_that_only_has_the_pid_is_left_alone(
    record: SessionRecord, spawn: Callable[[], Identity]
) -> None:
    innocent = spawn()
    other = Identity(innocent.pid, innocent.start_ticks - 1)
    replace(record, processes=(*record.processes, other)).write()
    kill(record.driver)
    assert end_orphan("abc").num_processes == 1
    assert not record.is_alive
    assert innocent.is_alive


def test_an_orphan_without_guardian_says_so_and_can_be_ended(record: SessionRecord) -> None:
    kill(record.driver)
    (orphan,) = list_orphans()
    assert not orphan.has_guardian
    assert choose_orphan(None).id == "abc"
    with pytest.raises(InvalidInputError, match="'other' without a kernel; there is abc"):
        choose_orphan("other")
    end_orphan("abc")
    assert list_orphans() == ()


def test_a_session_that_does_not_answer_stays_an_orphan(record: SessionRecord) -> None:
    kill(record.driver)
    with pytest.raises(StartError, match="%dist_orphans --end abc ends what is left of it"):
        AttachedCluster(record.dir)
    assert [orphan.id for orphan in list_orphans()] == ["abc"]


def test_what_belongs_to_a_kernel_cannot_be_ended(record: SessionRecord) -> None:
    with pytest.raises(InvalidInputError, match="no session without a kernel"):
        end_orphan("abc")
    assert record.is_alive


def test_a_folder_that_others_may_write_to_is_not_believed(record: SessionRecord) -> None:
    kill(record.driver)
    assert stat.S_IMODE((record.dir / "session.json").stat().st_mode) == 0o600
    record.dir.chmod(0o770)
    assert SessionRecord.read(record.dir) is None
    assert list_orphans() == ()


def test_a_record_of_another_boot_is_not_believed(
    record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "boot_id", lambda: "another")
    assert SessionRecord.read(record.dir) is None
