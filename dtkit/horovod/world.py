"""The world: which processes an elastic job has now, as its launcher wrote it down.

The launcher deals ranks anew when a process has ended, or when a process asks
for it, and writes them to a file with the number of that deal.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from dtkit.horovod.errors import HorovodInternalError
from dtkit.horovod.place import Place

__all__ = ["FOLDER", "WORKER", "ask_for_next", "is_elastic", "place", "write"]

FOLDER = "DTKIT_HVD_WORLD"
WORKER = "DTKIT_HVD_WORKER"
_POLL_S = 0.02
_TIMEOUT_S = 60.0


class _Seen:
    """The deal that this process has taken part in last."""

    number = 0


def is_elastic() -> bool:
    """Return whether a launcher deals ranks anew when one is lost."""
    return FOLDER in os.environ


def write(folder: Path, number: int, workers: list[int]) -> None:
    """Write down a deal: these processes, in the order of their ranks."""
    new = folder / "world.new"
    new.write_text(json.dumps({"number": number, "workers": workers}))
    new.replace(folder / "world")


def asked(folder: Path, number: int) -> bool:
    """Return whether a process has asked for the deal after that number."""
    return (folder / f"after.{number}").exists()


def ask_for_next() -> None:
    """Ask the launcher to deal anew; the next `place` waits until it has."""
    (Path(os.environ[FOLDER]) / f"after.{_Seen.number}").touch()


def place() -> Place:
    """Return this process's place in the newest deal, once it is newer than asked for.

    Raises:
        HorovodInternalError: this process is not in it, or it does not come.
    """
    folder, worker = Path(os.environ[FOLDER]), int(os.environ[WORKER])
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        world = json.loads((folder / "world").read_text())
        number, workers = int(world["number"]), list(world["workers"])
        if not asked(folder, number):
            break
        time.sleep(_POLL_S)
    else:
        msg = f"the launcher has not dealt ranks anew within {_TIMEOUT_S:.0f} s"
        raise HorovodInternalError(msg)
    if worker not in workers:
        msg = "this process is not among those that go on"
        raise HorovodInternalError(msg)
    _Seen.number = number
    rank = workers.index(worker)
    return Place(
        launcher="horovodrun", rank=rank, size=len(workers), local_rank=rank,
        local_size=len(workers), node="0", job=f"{os.environ['HOROVOD_JOB_ID']}-{number}",
    )  # fmt: skip
