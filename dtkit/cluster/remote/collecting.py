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

__all__ = ["bring_files", "bring_states", "files_of", "read_piece"]

_PIECE_BYTES = 4 << 20
_STAYS = "checkpoints/"
"""Too large to be brought, and read on the hosts again."""
_TIMEOUT_S = 10.0

# Any, below: JSON.


def files_of(folder: str) -> dict[str, int]:
    """Return what this host has of a run: sizes by path; nothing if the driver sees it itself."""
    run = Path(folder)
    if (run / "run.json").exists():  # the driver wrote it: the folder is shared
        return {}
    found = (path for path in run.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(run)): path.stat().st_size for path in found}
    return {name: size for name, size in sizes.items() if not name.startswith(_STAYS)}


def read_piece(path: str, offset: int) -> dict[str, Any]:
    """Return a piece of a run's file on this host, for another."""
    try:
        with Path(path).open("rb") as opened:
            opened.seek(offset)
            data = opened.read(_PIECE_BYTES)
    except OSError:  # it was put away meanwhile
        data = b""
    return {"data": base64.b64encode(data).decode()}


def bring_files(agents: Engines, folder: Path, *, is_over: bool) -> None:
    """Bring what is new in the files that ranks on other hosts have written of a run.

    Args:
        agents: of the hosts.
        folder: the run's.
        is_over: whether it has ended: then files that are not only added to are brought too.
    """
    answers = agents.control("files", {"folder": str(folder)}, timeout_s=_TIMEOUT_S)
    for agent, answer in answers.items():
        for name, size in answer.get("files", {}).items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                continue  # whoever answers, nothing is written elsewhere
            if path.parent == folder and path.suffix == ".jsonl":  # it is only added to
                _append(agents, agent, path, path, size)
            elif is_over:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.part")
                temporary.unlink(missing_ok=True)
                temporary.touch()
                _append(agents, agent, path, temporary, size)
                temporary.replace(path)


def _append(agents: Engines, agent: int, path: Path, target: Path, size: int) -> None:
    """Append to `target` what the host's file has more, up to a size."""
    while (offset := target.stat().st_size if target.exists() else 0) < size:
        request = {"path": str(path), "offset": offset}
        answers = agents.control("read", request, ranks=[agent], timeout_s=_TIMEOUT_S)
        data = base64.b64decode(answers.get(agent, {}).get("data", ""))
        if not data:
            break
        with target.open("ab") as file:
            file.write(data)


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
