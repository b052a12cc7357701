"""Small things that magics show: a line that changes, a table of ranks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit._where import describe, describe_all, format_seconds
from dtkit.livecontrol import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.driver.runs.run import Run
    from dtkit.values import HostLink, Orphan, RankPlace, RankStatus

__all__ = ["ControlTable", "LinkTable", "OrphanTable", "PlaceTable", "StageLine", "StatusTable"]

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


class Table:
    """Rows of text, in HTML and in plain text.

    Args:
        title: a line above it.
        head: the columns' names.
        rows: as long as the head each.
    """

    def __init__(self, title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        self._title, self._head, self._rows = title, head, rows

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in self._head)
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(c)}</td>" for c in row) + "</tr>"
            for row in self._rows
        )
        return f"<div>{escape(self._title)}</div><table><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        rows = [self._head, *self._rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._head))]
        body = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return f"{self._title}\n{body}".lstrip("\n")


class StatusTable(Table):
    """The ranks as a table."""

    def __init__(self, title: str, ranks: tuple[RankStatus, ...]) -> None:
        rows = [
            (
                str(rank.rank),
                f"{rank.device} ({rank.device_name})",
                rank.host,
                str(rank.pid),
                _memory(rank),
                rank.state,
            )
            for rank in ranks
        ]
        super().__init__(title, ("rank", "device", "host", "pid", "memory", "state"), rows)


class PlaceTable(Table):
    """Where the ranks are as a table, under a line that says who is waited for."""

    def __init__(self, places: tuple[RankPlace, ...]) -> None:
        has_hosts = any(place.host for place in places)
        rows = [
            (
                str(place.rank),
                *([place.host] if has_hosts else []),
                describe(place),
                "–" if place.line is None else f"{place.file} {place.line}".lstrip(),
                format_seconds(place.seconds) if place.line is not None else "–",
            )
            for place in places
        ]
        head = ("rank", *(["host"] if has_hosts else []), "now", "line", "for")
        super().__init__(describe_all(places), head, rows)


class LinkTable(Table):
    """How well hosts reach each other, as a table."""

    def __init__(self, links: Sequence[HostLink]) -> None:
        rows = [
            (
                link.source,
                f"{link.target} ({link.address})",
                "–" if link.latency_ms is None else f"{link.latency_ms:.2f} ms",
                "–" if link.mbit_per_s is None else f"{link.mbit_per_s:,.0f} Mbit/s",
                link.error,
            )
            for link in links
        ]
        super().__init__("", ("from", "to", "round trip", "one connection", ""), rows)


class OrphanTable(Table):
    """Sessions without a kernel as a table."""

    def __init__(self, orphans: tuple[Orphan, ...]) -> None:
        head = ("session", "ranks", "notebook", "run", "processes", "ends by itself")
        rows = [
            (
                orphan.id,
                f"{orphan.num_ranks} over {orphan.backend}",
                orphan.notebook or "–",
                orphan.run or "–",
                str(orphan.num_processes),
                _ends(orphan),
            )
            for orphan in orphans
        ]
        if orphans:
            title = "%dist_init --attach ID takes a session over, %dist_orphans --end ID ends it"
            super().__init__(title, head, rows)
        else:
            super().__init__("no session is without a kernel", (), [])


class ControlTable(Table):
    """Live controls of a run as a table; one of them, if it is named."""

    def __init__(self, run: Run, name: str | None = None) -> None:
        view = run.view()
        rows = [
            (
                found.control.name,
                shown(found.value),
                found.control.takes,
                "; ".join(
                    f"{shown(change.values[found.control.name])} from step {change.step + 1:,} on"
                    for change in view.changes
                    if found.control.name in change.values
                ),
            )
            for found in view.controls
            if name in (None, found.control.name)
        ]
        super().__init__(f"run {run.name}", ("control", "now", "takes", "changed to"), rows)


def _ends(orphan: Orphan) -> str:
    if not orphan.has_guardian:
        return "not without --end: its guardian is gone"
    if orphan.left_s is None:
        return (
            "with its run: its controller is gone" if orphan.is_headless else "not during its run"
        )
    minutes, seconds = divmod(round(orphan.left_s), 60)
    return f"in {minutes} min" if minutes else f"in {seconds} s"


def _memory(rank: RankStatus) -> str:
    if rank.used_bytes is None or not rank.total_bytes:
        return "–"
    return f"{rank.used_bytes / _GIB:.1f} of {rank.total_bytes / _GIB:.0f} GiB"


def _line(text: str) -> dict[str, str]:
    return {"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}
