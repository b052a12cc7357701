"""Ends what an agent that does not answer has left: `python -m …farewell FOLDER`, on its host."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dtkit.guard.processes import Identity, end, family
from dtkit.guard.record import remove

__all__ = ["PROCESS", "main", "note_agent"]

PROCESS = "agent.json"
"""In the agent's folder: which process it is, so that no other can be meant."""


def note_agent(folder: Path, process: Identity) -> None:
    """Write down which process is the agent of a folder."""
    (folder / PROCESS).write_text(json.dumps([process.pid, process.start_ticks]))


def main() -> None:
    """End the agent of a folder with its engines, and remove the folder."""
    folder = Path(sys.argv[1])
    try:
        agent = Identity(*json.loads((folder / PROCESS).read_text()))
    except (OSError, ValueError, TypeError):  # it has never come up
        agent = None
    if agent is not None:
        end(family([agent]), grace_s=0.0)
    remove(folder)


if __name__ == "__main__":
    main()
