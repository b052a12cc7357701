"""The lines of a file that another process writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["GrowingLines"]


@dataclass(slots=True)
class GrowingLines:
    """The whole lines of a file that grows, each given once.

    Attributes:
        path: the file; it need not be there yet.
        offset: how many of its bytes are passed over, or were read.
    """

    path: Path
    offset: int = 0

    def new(self) -> list[bytes]:
        """Return the lines that have become whole since the last look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:  # not begun yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.splitlines()
