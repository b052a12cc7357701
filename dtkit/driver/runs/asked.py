"""What another kernel asks of a run: lines in the run's folder, which its driver looks for."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from dtkit.driver.runs.lines import GrowingLines
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.livecontrol import Value

__all__ = ["Asked", "ask"]

_NAME = "controls.jsonl"
_INTERVAL_S = 0.2


def ask(folder: Path, values: dict[str, Value]) -> None:
    """Ask the driver of a run for new values of live controls.

    Raises:
        InvalidInputError: nothing can be written there.
    """
    try:
        with (folder / _NAME).open("a") as file:
            file.write(json.dumps(values) + "\n")  # one write: whole lines, whoever writes
    except OSError as error:
        msg = f"the run's driver cannot be asked: {error}; ask in the notebook that drives it"
        raise InvalidInputError(msg) from None


class Asked:
    """What was asked since the last look.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / _NAME
        # A driver that takes a run over has no business with what the last one was asked.
        self._lines = GrowingLines(path, path.stat().st_size if path.exists() else 0)
        self._next_s = 0.0

    def new(self) -> list[dict[str, Any]]:  # Any: JSON, not yet looked at
        """Return what is new, looking five times a second at most."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return []
        self._next_s = now_s + _INTERVAL_S
        return [found for line in self._lines.new() if (found := _read(line))]


def _read(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
