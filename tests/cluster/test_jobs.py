"""Sessions whose engines mpirun or Slurm start: real ones, that the tests bring along."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
from rig import (
    DIGITS,
    Rig,
    relative_error,
    take_back_while_it_waits,
    train_on_two_nodes,
)
from test_ssh import CELL

import dtkit
from dtkit.errors import InvalidInputError, RankError, StartError
from dtkit.guard.processes import Identity
from dtkit.launch import Launch
from testbed.slurm import Slurm, why_no_slurm, why_no_torque

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
        launch = Launch(
            engines="slurm", interface="lo", nodes=2, partition="lab", account="lab", time="10"
        )
    else:
        launch = Launch(engines="mpi", mpi="--bind-to none")
    session = dtkit.Session.start(2, launch=launch, devices="cpu", runs_dir=place / "runs")
    pids = {*session.pids(), *(status.pid for status in session.status())}
    owned_pids.update(pids)
    try:
        if request.param == "slurm":
            told = request.getfixturevalue("slurm").run("squeue", "--noheader", "--format=%P %a %l")
            assert told.split() == ["lab", "lab", "10:00"]  # partition, account, time
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
    launch = Launch(engines="slurm", interface="lo", nodes=2)
    take_back_while_it_waits(launch, "Resources, place 1 of 1", place)
    assert "dtkit" not in slurm.run("squeue", "--format=%j")
    slurm.run("scancel", "--user=root")


@pytest.mark.slurm
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-")
def test_a_job_that_slurm_does_not_take(slurm: Slurm, place: Path) -> None:  # noqa: ARG001
    launch = Launch(engines="slurm", interface="lo", partition="none")
    with pytest.raises(StartError, match=r"sbatch refuses the job: .*invalid partition"):
        dtkit.Session.start(1, launch=launch, devices="cpu", runs_dir=place)


PROFILES = {
    "pbs": '''
c.Cluster.engine_launcher_class = "pbs"
c.PBSEngineSetLauncher.batch_template = """#!/bin/sh
#PBS -V
#PBS -N dtkit
#PBS -t 1-{n}
#PBS -l nodes=1:ppn=2
#PBS -j oe
#PBS -o {output_file}
exec {program_and_args}
"""
''',
    "site": """
c.Cluster.engine_launcher_class = "slurm"
c.SlurmLauncher.queue = "lab"
c.SlurmLauncher.timelimit = "10"
""",
    "here": """
c.Cluster.engine_launcher_class = "ipyparallel.cluster.launcher.LocalEngineSetLauncher"
c.Cluster.controller_ip = "127.0.0.1"
""",
    "fixed": """
c.Cluster.engine_launcher_class = "slurm"
c.SlurmEngineSetLauncher.batch_template = "#!/bin/sh\\nsrun ipengine --profile-dir={profile_dir}"
""",
}


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Profiles of ipyparallel's, as a site has them."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for name, text in PROFILES.items():
        folder = tmp_path / f"profile_{name}"
        folder.mkdir()
        (folder / "ipcluster_config.py").write_text(f"c = get_config()\n{text}")
    return tmp_path


@pytest.mark.slurm
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-")
def test_a_profiles_batch_launcher_starts_the_agents(
    slurm: Slurm, profiles: Path, place: Path, digits: dict[str, Any]
) -> None:
    del slurm
    train_through("site", "lo", profiles, place, digits)


@pytest.mark.long
@pytest.mark.slurm
@pytest.mark.skipif(bool(why_no_torque()), reason=why_no_torque() or "-")
def test_pbs_commands_start_the_agents(
    slurm: Slurm, profiles: Path, place: Path, digits: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", f"{slurm.torque()}:{os.environ['PATH']}")
    slurm.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60")
    launch = Launch(engines="profile", profile="pbs", nodes=2, interface="lo")
    take_back_while_it_waits(launch, r"PBS job \d+ waits \(Q\)", place)
    assert "dtkit" not in slurm.run("squeue", "--format=%j")
    slurm.run("scancel", "--user=root")
    train_through("pbs", "lo", profiles, place, digits)


def test_a_profiles_local_launcher_starts_the_agents(
    profiles: Path, place: Path, digits: dict[str, Any]
) -> None:
    train_through("here", "", profiles, place, digits)


def train_through(
    name: str, interface: str, profiles: Path, place: Path, digits: dict[str, Any]
) -> None:
    """Train on two agents that a profile's launcher starts; leave nothing."""
    launch = Launch(engines="profile", profile=name, nodes=2, interface=interface)
    for _session in train_on_two_nodes(launch, 4, CELL, digits, place / "runs"):
        pass
    assert list((place / "tmp").glob("dtkit-*")) == []
    for folder in ("security", "log"):
        assert list((profiles / f"profile_{name}" / folder).glob("*")) == []


def test_a_profile_that_cannot_be_used(profiles: Path, place: Path) -> None:
    (profiles / "profile_empty").mkdir()
    for name, fix in {
        "fixed": "write {program_and_args} in place of ipengine",
        "empty": "has no ipcluster_config.py that names a launcher",
        "other": "no such profile in .*, only empty, fixed, here, pbs, site; `ipython profile",
    }.items():
        launch = Launch(engines="profile", profile=name, interface="lo")
        with pytest.raises(InvalidInputError, match=fix):
            dtkit.Session.start(2, launch=launch, devices="cpu", runs_dir=place / "runs")
    assert list((place / "tmp").glob("dtkit-*")) == []


def test_training_gives_the_curve_of_one_device(rig: Rig) -> None:
    expected = rig.plain(CELL)["losses"]
    run = rig.train(CELL)
    assert relative_error(run.history["loss"], expected) < 1e-5


def test_each_rank_knows_its_place(rig: Rig) -> None:
    hosts = [slot.host for slot in rig.session.slots]
    local_ranks = [slot.local_rank for slot in rig.session.slots]
    assert (hosts, local_ranks) in [(["node1", "node2"], [0, 0]), ([hosts[0]] * 2, [0, 1])]
    assert rig.values("local_rank") == local_ranks


def test_a_killed_engine_comes_back_and_the_job_goes_on(rig: Rig) -> None:
    rig.session.execute("kept = 'state'")
    with pytest.raises(RankError, match=r"its engine on \w+ was killed by SIGKILL"):
        rig.session.execute(KILL + "dist.all_reduce(torch.ones(1))")
    assert "rank 1: new engine" in rig.session.restart(refill=True)
    assert rig.common("kept") == "state"
    assert rig.train(CELL).state == "finished"
