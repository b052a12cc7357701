"""Nobody but the user reaches the engines: sockets on loopback, keys that are the user's own."""

from __future__ import annotations

import ipaddress
import json
import os
import stat
from typing import TYPE_CHECKING

import psutil
import pytest

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dtkit

BUSY = """
import torch
from torch.utils.data import DataLoader

pair = dist.new_group([0, 1])
dist.all_reduce(torch.ones(1), group=pair)
objects = [None, None]
dist.all_gather_object(objects, rank)
batches = iter(DataLoader(range(8), num_workers=1))
first = next(batches)
"""


def listening(pids: list[int]) -> Iterator[tuple[str, int, str]]:
    """Yield command, port and address: TCP that listens, UDP that is bound."""
    for pid in pids:
        process = psutil.Process(pid)
        for found in process.net_connections(kind="inet"):
            if found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                yield " ".join(process.cmdline())[:60], found.laddr.port, found.laddr.ip


def test_everything_that_listens_listens_on_loopback(session2: dtkit.Session) -> None:
    session2.execute(BUSY)
    found = list(listening([*session2.pids(), os.getpid()]))
    open_to_others = [f for f in found if not ipaddress.ip_address(f[2]).is_loopback]
    assert not open_to_others
    # The controller's, the store's and the engines' own are there at least: it is not blind.
    assert len(found) > 10
    session2.execute("del batches")


def test_only_the_user_reads_the_folder_and_the_keys(session2: dtkit.Session) -> None:
    folder = session2._cluster.dir
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = sorted(folder.glob("security/ipcontroller-*.json"))
    assert [path.name for path in keys] == ["ipcontroller-client.json", "ipcontroller-engine.json"]
    for path in (*keys, folder / "session.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in keys:
        found = json.loads(path.read_text())
        assert len(found["key"]) >= 32
        assert found["signature_scheme"] == "hmac-sha256"
        assert "127.0.0.1" in str(found)


def test_the_environment_of_the_processes_holds_no_key(session2: dtkit.Session) -> None:
    key = json.loads((session2._cluster.dir / "security/ipcontroller-client.json").read_text())
    for pid in session2.pids():
        process = psutil.Process(pid)
        assert key["key"] not in " ".join([*process.cmdline(), *process.environ().values()])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".hidden", "", "a\0b", "x" * 101])
def test_a_run_stays_in_its_folder(session2: dtkit.Session, name: str) -> None:
    before = set(session2.runs_dir.parent.iterdir())
    with pytest.raises(InvalidInputError, match="use letters, digits"):
        session2.train("1", name=name)
    assert set(session2.runs_dir.parent.iterdir()) == before
