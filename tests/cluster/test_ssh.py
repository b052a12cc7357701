"""One session over two hosts, reached by SSH: real servers, and addresses of their own."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from rig import DIGITS, Rig, relative_error

import dtkit
from dtkit.cluster.remote.ssh import SshFleet
from dtkit.errors import RankError, StartError
from dtkit.launch import Launch, parse_hosts
from dtkit.options import RunOptions
from dtkit.views.render import ranks_table
from dtkit.views.words import slow_ranks, summary_text
from testbed.sshd import SshHosts, why_no_ssh_hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.driver.runs.run import Run

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(bool(why_no_ssh_hosts()), reason=why_no_ssh_hosts() or "-"),
]

ROOT = Path(__file__).parents[2]
CELL = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for images, labels in DataLoader(train_set, batch_size=60, shuffle=True):
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""
WAIT = """
import time
kept = "state"
if rank == {rank}:
    time.sleep(600)
dist.all_reduce(torch.ones(1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notebook's folder; the second host has an empty one in its place."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def hosts(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SshHosts]:
    """Two hosts; the test's own process is on the first."""
    with (
        SshHosts(2, tmp_path_factory.mktemp("hosts"), hidden=folder) as made,
        made.host("host-a").entered(),
        contextlib.chdir(folder),
    ):
        yield made


@pytest.fixture(scope="module")
def session(hosts: SshHosts, folder: Path, owned_pids: set[int]) -> Iterator[dtkit.Session]:
    """Three ranks, two of them on the first host; when it is closed nothing of it is left."""
    launch = launch_of(hosts, "host-a:2,host-b:1")
    with dtkit.Session.start(launch=launch, devices="cpu", runs_dir=folder / "runs") as opened:
        there = {pid for name in hosts.names for pid in hosts.pids(name)}
        owned_pids.update(there, opened.pids())
        yield opened
    owned_pids.difference_update(there, opened.pids())
    assert [hosts.left(name) for name in hosts.names] == [[], []]
    # The last test ends the second host as a loss of power would, with its files in place.
    assert not list(hosts.temporary("host-a").glob("dtkit-*"))


@pytest.fixture(scope="module")
def rig(session: dtkit.Session, digits: dict[str, Any]) -> Rig:
    """The digits on every rank."""
    session.execute(DIGITS)
    return Rig(session, digits)


def launch_of(hosts: SshHosts, names: str) -> Launch:
    return Launch(
        engines="ssh", hosts=parse_hosts(names), python=str(hosts.python), ssh=f"-F {hosts.config}"
    )


# Before a session is opened that lasts for the module: a process has one at a time.
def refusal(hosts: SshHosts, name: str = "host-b", python: str = "", *lines: str) -> str:
    """Return why a host cannot be used, under a configuration that begins with some lines."""
    config = hosts.config.with_name("ssh_config_changed")
    own = "\n".join([*lines, "ConnectTimeout 1", ""])
    config.write_text(own + hosts.config.read_text())
    launch = Launch(
        engines="ssh", hosts=parse_hosts(name), python=python or str(hosts.python),
        ssh=f"-F {config}",
    )  # fmt: skip
    with pytest.raises(StartError) as caught:
        SshFleet(launch)._greet(name)
    return str(caught.value)


def test_a_host_that_cannot_be_logged_in_to_is_told_with_its_fix(hosts: SshHosts) -> None:
    own_key = hosts.config.with_name("host-a")
    changed = hosts.config.with_name("known_hosts_changed")
    key = own_key.with_suffix(".pub").read_text()
    changed.write_text(f"{hosts.host('host-b').address} {key}")
    for line, fix in {
        "UserKnownHostsFile /dev/null": "`ssh host-b` once in a terminal and compare the finger",
        f"UserKnownHostsFile {changed}": "another than before: find out why, then `ssh-keygen -R",
        "PubkeyAuthentication no": "it takes no key of yours: `ssh-copy-id host-b`",
        "HostName 10.77.0.99": "host-b: nothing leads there|host-b: it does not answer",
        "Port 23": "no SSH server answers there: start sshd, or check the port",
    }.items():
        assert re.search(fix, refusal(hosts, "host-b", "", line)), line
    assert "no-such-host: no such name: check --hosts" in refusal(hosts, "no-such-host")
    with pytest.raises(StartError, match="no-such-host: its name is not known here"):
        SshFleet(launch_of(hosts, "no-such-host:1")).own_address()


def test_an_interpreter_that_is_not_one_is_told_with_its_fix(hosts: SshHosts) -> None:
    for python, fix in {
        "/no/python": "host-b: no Python at that path there: name one with --python PATH",
        str(hosts.config): "host-b: what is at that path cannot be run",
        "/bin/false": "host-b: --python PATH must name a Python with dtkit",
        "/usr/bin/python3": "install dtkit there, or name an interpreter that has it",
    }.items():
        assert fix in refusal(hosts, python=python), python


def test_a_check_alone_names_what_differs_and_leaves_nothing(
    hosts: SshHosts, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    launch = launch_of(hosts, "host-a,host-b")
    found = dtkit.Session.check_hosts(launch)
    assert found.problems == ()
    assert {(link.source, link.target) for link in found.links} == {
        ("host-a", "host-b"), ("host-b", "host-a")
    }  # fmt: skip
    assert all(link.latency_ms and link.mbit_per_s for link in found.links)

    other = tmp_path / "other"  # as if another release were installed on the second host
    (other / "dtkit-0.0.1.dist-info").mkdir(parents=True)
    (other / "dtkit-0.0.1.dist-info/METADATA").write_text("Name: dtkit\nVersion: 0.0.1\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$(hostname)" = host-b ] && export PYTHONPATH={other}:{ROOT} || '
        f'export PYTHONPATH={ROOT}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (problem,) = dtkit.Session.check_hosts(replace(launch, python=str(python))).problems
    assert "0.0.1 on host-b" in problem
    assert problem.startswith("dtkit differs: ")
    assert "Install the same version everywhere" in problem
    with pytest.raises(StartError, match=r"dtkit differs: .* 0\.0\.1 on host-b"):
        dtkit.Session.start(
            launch=replace(launch, python=str(python)), devices="cpu", runs_dir=folder / "runs"
        )
    assert not list((tmp_path / "here").iterdir())
    for name in hosts.names:
        assert hosts.left(name) == []
        assert not list(hosts.temporary(name).glob("dtkit-*"))


def test_ranks_are_grouped_by_host(session: dtkit.Session) -> None:
    assert [slot.host for slot in session.slots] == ["host-a", "host-a", "host-b"]
    assert [slot.local_rank for slot in session.slots] == [0, 1, 0]
    found = session.execute("import socket\n(rank, local_rank, world_size, socket.gethostname())")
    assert found.results == {
        0: "(0, 0, 3, 'host-a')", 1: "(1, 1, 3, 'host-a')", 2: "(2, 0, 3, 'host-b')"
    }  # fmt: skip
    assert [status.host for status in session.status()] == ["host-a", "host-a", "host-b"]


def test_training_gives_the_curve_of_one_device(rig: Rig) -> None:
    expected = rig.plain(CELL)["losses"]
    run = rig.train(CELL)
    assert relative_error(run.history["loss"], expected) < 1e-5
    rig.assert_same_weights("model")
    assert (run.dir / "rank-0.jsonl").stat().st_size
    assert (run.dir / "rank-2.jsonl").stat().st_size  # written in that host's own folder
    assert "not stored on disk" not in str(run.notes)


def test_a_straggler_on_the_other_host_is_named_with_its_host(rig: Rig) -> None:
    slow = "    time.sleep(0.03 if rank == 2 else 0.0)\n    loss = "
    cell = "import time" + CELL.replace("    loss = ", slow)
    run = rig.train(cell, options=RunOptions(timeline=""))
    timeline = run.timeline()
    late = timeline.analysis.stragglers[0]
    assert (late.rank, late.cause) == (2, "compute")
    assert "for rank 2 on host-b, which computes" in timeline.advice[0]
    rows = repr(timeline).splitlines()
    assert [row.split()[:3] for row in rows if re.match(r"\d on host", row)] == [
        ["0", "on", "host-a"], ["1", "on", "host-a"], ["2", "on", "host-b"]
    ]  # fmt: skip

    trace = json.loads((run.dir / "timeline.json").read_text())["otherData"]
    assert [clock["host"] for clock in trace["clocks"].values()] == ["host-a", "host-a", "host-b"]
    for clock in trace["clocks"].values():  # they are one machine's: what is told holds
        assert abs(clock["offset_us"]) <= clock["error_us"]
        assert abs(clock["offset_us"] + clock.get("drift_us", 0.0)) <= clock["error_us"]
    assert 0.0 < trace["error_us"] == trace["clocks"]["2"]["error_us"]

    view = run.view()
    assert slow_ranks(view) == [2]
    for table in (summary_text(view, ()), ranks_table(view)):
        (row,) = [row for row in re.split("\n|<tr", table) if "slow" in row]
        assert "host-b cpu" in row


def test_a_checkpoint_in_a_folder_that_a_host_lacks_is_told_with_the_fix(rig: Rig) -> None:
    run = rig.train(CELL, options=RunOptions(checkpoint_every=10))
    told = [note for note in run.notes if "checkpoint" in note]
    assert "step 10 was not written: rank 2: " in told[0]
    assert re.search(r" is not on host-b: checkpoints need a folder that all hosts see", told[0])
    assert run.history.num_steps == 30


def test_nothing_listens_beyond_the_interface(hosts: SshHosts, session: dtkit.Session) -> None:
    session.execute("pair = dist.new_group([0, 2])")
    network = ipaddress.ip_network("10.77.0.0/24")
    own = {pid for pid in psutil.pids() if pid == os.getpid()}
    found = set()
    for pid in {*hosts.pids("host-a"), *hosts.pids("host-b"), *own}:
        for connection in psutil.Process(pid).net_connections(kind="inet"):
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                found.add(connection.laddr.ip)
    assert any(ipaddress.ip_address(address) in network for address in found)
    for address in map(ipaddress.ip_address, found):
        assert address.is_loopback or address in network


def test_keys_stay_in_files_that_only_the_user_reads(
    hosts: SshHosts, session: dtkit.Session
) -> None:
    client = json.loads((session._cluster.dir / "security/ipcontroller-client.json").read_text())
    # Whoever connects must know it; it never goes over the wire.
    secret = client["curve_serverkey"]
    assert len(secret) == 40
    for name in hosts.names:
        (there,) = hosts.temporary(name).glob("dtkit-launch-*")
        assert stat.S_IMODE(there.stat().st_mode) == 0o700
        connection = there / "security" / "ipcontroller-engine.json"
        assert stat.S_IMODE(connection.stat().st_mode) == 0o600
        assert json.loads(connection.read_text())["curve_serverkey"] == secret
        for pid in hosts.pids(name):
            process = psutil.Process(pid)
            words = [*process.cmdline(), *process.environ().values()]
            if "dtkit.cluster.remote.agent" not in words:  # its launcher told it, it told no one
                assert secret not in " ".join(words)


def test_an_object_comes_from_another_host_in_pieces(rig: Rig) -> None:
    rig.session.execute("big = torch.arange(12_000_000.) + rank", ranks=[2])
    pulled = rig.session.pull("big", rank=2).value
    assert pulled.shape == (12_000_000,)
    assert pulled[-1].item() == 12_000_001.0
    rig.session.push({"small": [1, 2]}, ranks=[2])
    assert rig.session.execute("small", ranks=[2]).results == {2: "[1, 2]"}


def test_a_module_of_the_notebooks_folder_that_a_host_lacks(rig: Rig, folder: Path) -> None:
    (folder / "helper.py").write_text("ANSWER = 42\n")
    assert rig.session.execute("import helper\nhelper.ANSWER", ranks=[0]).results == {0: "42"}
    with pytest.raises(RankError, match=r"helper is in .*, and not on host-b: .*rsync"):
        rig.session.execute("import helper")
    rig.session.execute("del helper", ranks=[0, 1])


def wait_in_a_collective(
    session: dtkit.Session, then: Callable[[Run], None], cell: str = WAIT.format(rank=2)
) -> Run:
    """Let ranks wait for the last one, then do something about it, and see the run end."""
    run, steps = session.training(cell)
    is_done = False
    for _ in steps:
        # The line tells it from the collectives with which a run begins.
        if not is_done and ("all_reduce", 5) in [(p.operation, p.line) for p in session.where()]:
            is_done = True
            then(run)
        run.requests.alarm.wait(0.02)
    return run


def test_stop_frees_ranks_on_both_hosts(rig: Rig) -> None:
    run = wait_in_a_collective(rig.session, lambda run: run.requests.stop_now())
    assert run.state == "stopped"
    assert rig.common("kept") == "state"
    assert rig.train(CELL).state == "finished"


def test_an_engine_on_the_other_host_that_is_killed(rig: Rig) -> None:
    rig.session.execute("kept = 'state'")
    kill = "import os, signal\nif rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    with pytest.raises(RankError, match="its engine on host-b was killed by SIGKILL"):
        rig.session.execute(kill + "dist.all_reduce(torch.ones(1))")
    assert "rank 2: new engine" in rig.session.restart(refill=True)
    assert rig.common("kept") == "state"
    assert rig.train(CELL).state == "finished"


def test_a_host_that_is_gone(hosts: SshHosts, rig: Rig) -> None:
    rig.session.execute("kept = 'state'")
    with pytest.raises(RankError, match="host-b") as caught:
        wait_in_a_collective(rig.session, lambda _run: hosts.end("host-b"))
    (cause,) = caught.value.causes
    assert (cause.rank, cause.ename) == (2, "EngineDied")
    assert rig.session.execute("kept", ranks=[0, 1]).results == {0: "'state'", 1: "'state'"}
    with pytest.raises(StartError, match="host host-b is gone"):
        rig.session.restart()
