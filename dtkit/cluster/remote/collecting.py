"""What ranks on other hosts have written of their runs, brought to the notebook's host.

Ranks write where they run. A later kernel, the guardian and the archive look here. Where
hosts share the folder nothing is brought.
"""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.guard.record import RankRun

if TYPE_CHECKING:
    from dtkit.cluster.engines import Engines
    from dtkit.guard.processes import Identity

__all__ = ["bring_files", "bring_states", "read_piece"]

_PIECE_BYTES = 4 << 20
_FILES = ("rank-{}.jsonl", "output-{}.jsonl")
_TIMEOUT_S = 10.0

# Any, below: JSON.


def read_piece(path: str, offset: int) -> dict[str, Any]:
    """Return a piece of a run's file on this host, for another; of a folder that both see, none."""
    file = Path(path)
    if (file.parent / "run.json").exists():  # the driver wrote it: the folder is shared
        return {"data": ""}
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(_PIECE_BYTES)
    except OSError:  # not begun yet
        data = b""
    return {"data": base64.b64encode(data).decode()}


def bring_files(agents: Engines, agent_of: dict[int, int], folder: Path) -> None:
    """Bring what is new in the files that ranks have written of a run.

    Args:
        agents: of the hosts, by number.
        agent_of: the number of each rank's.
        folder: the run's.
    """
    for rank, agent in agent_of.items():
        for name in _FILES:
            path = folder / name.format(rank)
            while True:
                size = path.stat().st_size if path.exists() else 0
                request = {"path": str(path), "offset": size}
                answers = agents.control("read", request, ranks=[agent], timeout_s=_TIMEOUT_S)
                data = base64.b64decode(answers.get(agent, {}).get("data", ""))
                if data:
                    with path.open("ab") as file:
                        file.write(data)
                if len(data) < _PIECE_BYTES:
                    break


def bring_states(agents: Engines, session_dir: Path, alive: Identity) -> None:
    """Write down here which runs the ranks of other hosts are in, as they do there.

    Args:
        agents: of the hosts, by number.
        session_dir: the session's folder on this host.
        alive: a process here that lives as long as the session: the ranks' own are elsewhere.
    """
    for answer in agents.control("runs", timeout_s=_TIMEOUT_S).values():
        for values in answer.get("runs", ()):
            run = RankRun(**{**values, "ranks": tuple(values["ranks"]), "process": alive})
            has_ended = run.state == "running" and not values["process"]["is_alive"]
            with contextlib.suppress(OSError):  # the session has ended meanwhile
                replace(run, state="failed" if has_ended else run.state).write(session_dir)
