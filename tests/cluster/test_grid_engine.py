"""A session whose agents Grid Engine starts: its real daemons, on two hosts with own addresses."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from rig import take_back_while_it_waits, train_on_two_nodes
from test_ssh import CELL, WAIT, wait_in_a_collective

import dtkit
from dtkit.errors import RankError, StartError
from dtkit.launch import Launch
from testbed.gridengine import GridEngine, command_of, why_no_grid_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.long,
    pytest.mark.sge,
    pytest.mark.skipif(bool(why_no_grid_engine()), reason=why_no_grid_engine() or "-"),
]

LAUNCH = Launch(engines="profile", profile="sge", nodes=2)
# As docs/clusters.md has it.
PROFILE = '''
c = get_config()
c.Cluster.engine_launcher_class = "sge"
c.SGEEngineSetLauncher.batch_template = """#!/bin/sh
#$ -V
#$ -S /bin/sh
#$ -N dtkit
#$ -t 1-{n}
#$ -pe smp 2
#$ -j y
#$ -o {output_file}
exec {program_and_args}
"""
'''
WAIT_S = 60.0


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of ipyparallel's, as its user has edited it."""
    folder = tmp_path_factory.mktemp("ipython") / "profile_sge"
    folder.mkdir()
    (folder / "ipcluster_config.py").write_text(PROFILE)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, profile: Path) -> Iterator[GridEngine]:
    """Two hosts; the test's own process is on the first."""
    with (
        GridEngine(tmp_path_factory.mktemp("grid")) as made,
        made.network.hosts[0].entered(),
        contextlib.chdir(tmp_path_factory.mktemp("notebook")),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("IPYTHONDIR", str(profile.parent))
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_that_waits_says_so_and_can_be_taken_back(grid: GridEngine, tmp_path: Path) -> None:
    for _ in grid.names:
        grid.run("qsub", "-b", "y", "-pe", "smp", "2", "-N", "other", "-o", "/dev/null",
                 "-j", "y", "sleep", "60")  # fmt: skip
    take_back_while_it_waits(LAUNCH, r"SGE job 3 waits \(qw\); ■ takes it back", tmp_path)
    assert "dtkit" not in grid.run("qstat")
    grid.run("qdel", "-u", "root")


def test_a_job_that_cannot_run_says_why(grid: GridEngine, profile: Path, tmp_path: Path) -> None:
    del grid
    config = profile / "ipcluster_config.py"
    for written, instead, why in (
        ("smp", "other", 'job rejected: the requested parallel environment "other" does not exist'),
        ("{output_file}", "/no/log", r"SGE job \d is over \(Eqw .*can't open output file"),
        ("exec {", "exec /no/python {", r"(?s)is over \(gone\): .*/no/python: not found"),
    ):
        config.write_text(PROFILE.replace(written, instead))
        with pytest.raises(StartError, match=why):
            dtkit.Session.start(2, launch=LAUNCH, devices="cpu", runs_dir=tmp_path)
    config.write_text(PROFILE)


def test_it_trains_over_two_hosts_and_outlives_an_agent(
    grid: GridEngine, profile: Path, digits: dict[str, Any], tmp_path: Path
) -> None:
    def kill_agent() -> None:
        for pid in grid.pids("host-b"):
            if "dtkit.cluster.remote.agent --told" in command_of(pid):
                os.kill(pid, signal.SIGKILL)

    for session in train_on_two_nodes(LAUNCH, 2, CELL, digits, tmp_path):
        assert [slot.host for slot in session.slots] in (["host-a", "host-b"], ["host-b", "host-a"])
        with pytest.raises(RankError, match="host host-b is gone"):
            wait_in_a_collective(session, lambda _run: kill_agent(), WAIT.format(rank=1))
        survivor = next(slot.rank for slot in session.slots if slot.host == "host-a")
        assert session.execute("kept", ranks=[survivor]).results == {survivor: "'state'"}
    wait_until(lambda: not grid.run("qstat"))
    for name in grid.names:
        wait_until(lambda: not grid.pids(name))  # noqa: B023  called at once
        assert not list(grid.temporary(name).iterdir())
    assert not list((profile / "security").iterdir())
    assert not list((profile / "log").iterdir())
