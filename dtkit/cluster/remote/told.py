"""What an agent is told by a file that all hosts see: not every launcher passes variables on."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_told", "write_told"]

# Any, below: JSON.


def write_told(path: Path, options: dict[str, Any], info: dict[str, Any], num_agents: int) -> None:
    """Write down, for this user alone, what all agents of a session are to know."""
    values = {"options": options, "info": info, "num_agents": num_agents}
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(values, file)


def read_told(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an agent's options and how the controller is reached.

    Each agent that reads it gets a number of its own, in the order in which they come; the
    last one removes the file, which holds the session's keys.
    """
    values = json.loads(path.read_text())
    num_agents = int(values["num_agents"])
    claims = [path.with_suffix(f".{number}") for number in range(num_agents)]
    for number, claim in enumerate(claims):
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            continue
        if number == num_agents - 1:
            for file in (path, *claims):
                file.unlink(missing_ok=True)
        return {**values["options"], "number": number}, values["info"]
    msg = f"more than {num_agents} agents were started: let the launcher start one per node"
    raise RuntimeError(msg)
