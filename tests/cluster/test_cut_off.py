"""Hosts that lose their kernel, or the network: taken over, given up, and nothing left on them."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from leaving import SAY_WHEN_IT_TRAINS, leave_in_a_run
from patience import wait_until
from test_ssh import WAIT, wait_in_a_collective

import dtkit
from dtkit.errors import EngineDiedError, RankError, StartError
from dtkit.guard.record import find_records
from testbed.sshd import SshHosts, why_no_ssh_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.values import Orphan

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(bool(why_no_ssh_hosts()), reason=why_no_ssh_hosts() or "-"),
]

# Heartbeats that stay out are noticed after 3 s; as it is, after 30 s.
DRIVER = """
import sys
import dtkit
from dtkit.cluster import starter
from dtkit.launch import Launch, parse_hosts

starter._CONTROLLER_ARGS[1] = "--HeartMonitor.max_heartmonitor_misses=30"
python, config, runs_dir, cell = sys.argv[1:]
launch = Launch(
    engines="ssh", hosts=parse_hosts("host-a:1,host-b:1"), python=python, ssh=f"-F {config}"
)
session = dtkit.Session.start(launch=launch, devices="cpu", runs_dir=runs_dir)
run, steps = session.training(cell, name="lasting")
"""
DRIVER += SAY_WHEN_IT_TRAINS
CELL = """
import time
import torch

kept = "state"
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
while True:
    optimizer.zero_grad()
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
    time.sleep(0.01)  # as slow as a larger model: the machine is for what is waited for
"""


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SshHosts]:
    """Two hosts; the test's own process is on the first, in a folder that the second lacks."""
    folder = tmp_path_factory.mktemp("notebook")
    with (
        SshHosts(2, tmp_path_factory.mktemp("hosts"), hidden=folder) as made,
        made.host("host-a").entered(),
        contextlib.chdir(folder),
    ):
        yield made


@pytest.fixture(scope="module")
def session(hosts: SshHosts) -> Iterator[dtkit.Session]:
    """A session whose first kernel was killed during a run, taken over by this one."""
    words = [str(hosts.python), str(hosts.config), str(Path("runs").resolve()), CELL]
    opened, run, steps = dtkit.Session.attaching(leave_in_a_run(DRIVER, *words))
    assert run is not None
    assert run.state == "running"
    run.requests.stop()
    for _ in steps:
        run.requests.alarm.wait(0.02)
    assert run.state == "stopped"
    with opened:
        yield opened


def test_another_kernel_takes_hosts_over_and_stops_their_run(session: dtkit.Session) -> None:
    run = dtkit.last_run
    assert list(run.history["step"][:3]) == [1, 2, 3]
    assert session.execute("kept").results == {0: "'state'", 1: "'state'"}
    total = session.execute("x = torch.ones(1)\ndist.all_reduce(x)\nx.item()").results
    assert total == {0: "2.0", 1: "2.0"}


def test_a_host_that_is_cut_off_is_given_up(hosts: SshHosts, session: dtkit.Session) -> None:
    host = hosts.host("host-b")
    with pytest.raises(RankError, match=r"host host-b is gone: .* cannot be reached") as caught:
        wait_in_a_collective(
            session,
            lambda _run: hosts.network.connect(host, is_connected=False),
            WAIT.format(rank=1),
        )
    (cause,) = caught.value.causes
    assert (cause.rank, cause.ename) == (1, "EngineDied")
    # No engine can be started there, so that none is promised.
    assert "%dist_init without that host" in str(caught.value)
    assert "%dist_restart" not in str(caught.value)
    with pytest.raises(EngineDiedError, match="%dist_init without that host"):
        session.execute("kept")
    assert session.execute("kept", ranks=[0]).results == {0: "'state'"}
    with pytest.raises(StartError, match="host host-b is gone"):
        session.restart()
    session.close()
    hosts.network.connect(host, is_connected=True)
    for name in hosts.names:  # an agent that was not told misses the controller
        wait_until_empty(hosts, name)


def test_what_a_kernel_left_that_was_killed_with_its_guardian_is_listed_and_ended(
    hosts: SshHosts,
) -> None:
    runs = Path("left").resolve()
    words = [str(hosts.python), str(hosts.config), str(runs), CELL]
    session_id = leave_in_a_run(DRIVER, *words)
    record = next(record for record in find_records() if record.id == session_id)
    assert record.guardian is not None
    os.kill(record.guardian.pid, signal.SIGKILL)

    def orphan() -> Orphan:
        return next(each for each in dtkit.Session.orphans() if each.id == session_id)

    # The controller puts another in its place.
    wait_until(lambda: orphan().has_guardian, orphan)
    wait_until(lambda: orphan().run == "lasting", orphan)  # it has asked the hosts
    theirs = runs / "lasting" / "rank-1.jsonl"
    wait_until(theirs.exists, "what the other host's rank has written, brought by the guardian")
    dtkit.Session.end_orphan(session_id)
    assert session_id not in [each.id for each in dtkit.Session.orphans()]
    for name in hosts.names:
        wait_until_empty(hosts, name)


def wait_until_empty(hosts: SshHosts, name: str) -> None:
    def left() -> list[bytes]:
        return [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in hosts.pids(name)]

    wait_until(lambda: not hosts.pids(name), left)
    assert not list(hosts.temporary(name).glob("dtkit-*"))
