"""Small things that magics show: a line that changes, a table of ranks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import display

if TYPE_CHECKING:
    from dtkit.values import RankStatus

__all__ = ["StageLine", "StatusTable"]

_GIB = 2**30


class StageLine:
    """One line that says what is being done, and in the end what came of it."""

    def __init__(self, text: str) -> None:
        self._is_notebook = getattr(get_ipython(), "kernel", None) is not None
        self._handle: Any = None  # DisplayHandle
        if self._is_notebook:
            self._handle = display(_line(f"{text} …"), raw=True, display_id=True)

    def show(self, stage: str) -> None:
        """Show the stage that begins."""
        if self._handle is not None:
            self._handle.update(_line(f"{stage} …"), raw=True)

    def finish(self, text: str) -> None:
        """Leave this line."""
        if self._handle is not None:
            self._handle.update(_line(text), raw=True)
        else:
            display(_line(text), raw=True)


class StatusTable:
    """The ranks as a table, in HTML and in text."""

    _HEAD = ("rank", "device", "host", "pid", "memory", "state")

    def __init__(self, title: str, ranks: tuple[RankStatus, ...]) -> None:
        self.title = title
        self.ranks = ranks

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in self._HEAD)
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(c)}</td>" for c in row) + "</tr>"
            for row in self._rows()
        )
        return f"<div>{escape(self.title)}</div><table><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._HEAD))]
        body = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return f"{self.title}\n{body}"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                str(rank.rank),
                f"{rank.device} ({rank.device_name})",
                rank.host,
                str(rank.pid),
                _memory(rank),
                rank.state,
            )
            for rank in self.ranks
        ]


def _memory(rank: RankStatus) -> str:
    if rank.used_bytes is None or not rank.total_bytes:
        return "–"
    return f"{rank.used_bytes / _GIB:.1f} of {rank.total_bytes / _GIB:.0f} GiB"


def _line(text: str) -> dict[str, str]:
    return {"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}
