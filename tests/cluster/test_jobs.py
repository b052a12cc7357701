"""Sessions whose engines mpirun or Slurm start: real ones, that the tests bring along."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from rig import DIGITS, Rig, relative_error
from test_ssh import CELL

import dtkit
from dtkit.errors import RankError, StartError
from dtkit.guard.processes import Identity
from dtkit.launch import Launch
from testbed.slurm import Slurm, why_no_slurm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-"),
]
ENGINES = [
    pytest.param("mpi", marks=pytest.mark.mpi),
    pytest.param("slurm", marks=needs_slurm),
]
KILL = "import os, signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,  # noqa: ARG001
) -> Iterator[Path]:
    """A notebook's folder, with folders of temporary files of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
        patch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        patch.setattr("tempfile.tempdir", str(folder / "tmp"))
        patch.setenv("TMPDIR", str(folder / "tmp"))
        yield folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes."""
    with (
        Slurm(tmp_path_factory.mktemp("slurm")) as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module", params=ENGINES)
def rig(
    request: pytest.FixtureRequest, place: Path, digits: dict[str, Any], owned_pids: set[int]
) -> Iterator[Rig]:
    """Two ranks with the digits; when the session is closed nothing of it is left."""
    if request.param == "slurm":
        request.getfixturevalue("slurm")
        launch = Launch(engines="slurm", interface="lo", nodes=2, partition="lab", time="10")
    else:
        launch = Launch(engines="mpi", mpi="--bind-to none")
    session = dtkit.Session.start(2, launch=launch, devices="cpu", runs_dir=place / "runs")
    pids = {*session.pids(), *(status.pid for status in session.status())}
    owned_pids.update(pids)
    try:
        session.execute(DIGITS)
        yield Rig(session, digits)
    finally:
        session.close()
        owned_pids.difference_update(pids)
    assert not [pid for pid in pids if Identity.of(pid)]
    assert list((place / "tmp").glob("dtkit-*")) == []


# Before a session is opened that lasts for the module: a process has one at a time.
@pytest.mark.slurm
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-")
def test_a_job_that_waits_says_so_and_can_be_taken_back(slurm: Slurm, place: Path) -> None:
    slurm.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60")
    stages: list[str] = []

    def show(stage: str) -> None:
        stages.append(stage)
        if "Resources, place 1 of 1" in stage:
            raise KeyboardInterrupt  # ■

    launch = Launch(engines="slurm", interface="lo", nodes=2)
    with pytest.raises(KeyboardInterrupt):
        dtkit.Session.start(2, launch=launch, devices="cpu", runs_dir=place, on_stage=show)
    assert "dtkit" not in slurm.run("squeue", "--format=%j")
    slurm.run("scancel", "--user=root")


@pytest.mark.slurm
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-")
def test_a_job_that_slurm_does_not_take(slurm: Slurm, place: Path) -> None:  # noqa: ARG001
    launch = Launch(engines="slurm", interface="lo", partition="none")
    with pytest.raises(StartError, match=r"sbatch refuses the job: .*invalid partition"):
        dtkit.Session.start(1, launch=launch, devices="cpu", runs_dir=place)


def test_training_gives_the_curve_of_one_device(rig: Rig) -> None:
    expected = rig.plain(CELL)["losses"]
    run = rig.train(CELL)
    assert relative_error(run.history["loss"], expected) < 1e-5


def test_each_rank_knows_its_place(rig: Rig) -> None:
    hosts = [slot.host for slot in rig.session.slots]
    local_ranks = [slot.local_rank for slot in rig.session.slots]
    assert (hosts, local_ranks) in [(["node1", "node2"], [0, 0]), ([hosts[0]] * 2, [0, 1])]
    assert rig.values("local_rank") == local_ranks


@pytest.mark.parametrize("rig", [pytest.param("mpi", marks=pytest.mark.mpi)], indirect=True)
def test_a_killed_engine_comes_back_and_the_job_goes_on(rig: Rig) -> None:
    rig.session.execute("kept = 'state'")
    with pytest.raises(RankError, match=r"its engine on \w+ was killed by SIGKILL"):
        rig.session.execute(KILL + "dist.all_reduce(torch.ones(1))")
    assert "rank 1: new engine" in rig.session.restart(refill=True)
    assert rig.common("kept") == "state"
    assert rig.train(CELL).state == "finished"
