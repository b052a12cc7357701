"""A cell that is no run, under the notebook's: its text by ranks, its figures with a label."""

from __future__ import annotations

import contextlib
import time
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit._ranks import format_ranks
from dtkit.views import render

if TYPE_CHECKING:
    from dtkit.output import Display, OutputBlock

__all__ = ["CellText", "Displays"]

_REFRESH_S = 0.1
_MAX_SHOWN_CHARS = 50_000
_MAX_RESULT_CHARS = 20_000


class Output(Protocol):
    """What a cell shows on the ranks, as it comes."""

    results: dict[int, str]
    """What its last expression gave, as text, by rank."""
    num_changes: int
    """Grows with everything that was shown."""

    def blocks(self) -> tuple[OutputBlock, ...]:
        """Return the text so far, equal texts merged."""

    def take_displays(self, *, is_final: bool = False) -> list[Display]:
        """Return the displays that are ready."""


class CellText:
    """The text of a cell under it: in a notebook one output that changes, else plain lines.

    Args:
        output: what the cell shows.
        world_size: number of ranks, so that "all ranks" can be said.
    """

    def __init__(self, output: Output, world_size: int) -> None:
        self._output = output
        self._world_size = world_size
        self._displays = Displays(output, world_size)
        self._handle: Any = None  # DisplayHandle
        self._is_notebook = getattr(get_ipython(), "kernel", None) is not None
        self._num_changes = 0
        self._next_s = 0.0

    def refresh(self) -> None:
        """Show what is new, ten times a second at most."""
        if time.monotonic() < self._next_s or self._output.num_changes == self._num_changes:
            return
        self._next_s = time.monotonic() + _REFRESH_S
        self._num_changes = self._output.num_changes
        if self._is_notebook:
            self._draw()
        self._displays.refresh()

    def finish(self) -> None:
        """Show everything, results included, for good."""
        if self._is_notebook:
            self._draw(is_final=True)
        else:
            print(self._text(), end="")  # noqa: T201  a terminal: this is the cell's output
        self._displays.refresh(is_final=True)

    def _draw(self, *, is_final: bool = False) -> None:
        text = self._text()
        if not text:
            return
        bundle = {"text/html": self._html(is_final=is_final), "text/plain": text.rstrip("\n")}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _html(self, *, is_final: bool) -> str:
        blocks = self._output.blocks()
        html = ""
        if blocks:
            html = render.log_blocks(
                blocks, self._world_size, max_chars=_MAX_SHOWN_CHARS, is_live=not is_final
            )
        return html + "".join(
            f"<pre style='margin:2px 0'>{escape(line)}</pre>" for line in self._result_lines()
        )

    def _text(self) -> str:
        parts = []
        blocks = self._output.blocks()
        for block in blocks:
            label = format_ranks(block.ranks, self._world_size)
            is_everyone = len(block.ranks) == self._world_size
            parts.append("" if is_everyone and len(blocks) == 1 else f"── {label} ──\n")
            parts.append(block.text if block.text.endswith("\n") else block.text + "\n")
        parts += [line + "\n" for line in self._result_lines()]
        return "".join(parts)

    def _result_lines(self) -> list[str]:
        by_text: dict[str, list[int]] = {}
        for rank, text in sorted(self._output.results.items()):
            by_text.setdefault(text, []).append(rank)
        return [
            f"{format_ranks(ranks, self._world_size)}:{_gap(text)}{_beginning(text)}"
            for text, ranks in by_text.items()
        ]


class Displays:
    """Figures and tables of the ranks, shown as the driver's own with a label.

    Args:
        output: what the cell shows.
        world_size: number of ranks; of one alone nothing is labelled.
    """

    def __init__(self, output: Output, world_size: int) -> None:
        self._output = output
        self._world_size = world_size

    def refresh(self, *, is_final: bool = False) -> None:
        """Show those that are ready; at the end all."""
        for shown in self._output.take_displays(is_final=is_final):
            self._show(shown)

    def _show(self, shown: Display) -> None:
        label = format_ranks(shown.ranks, self._world_size)
        if self._world_size > 1:
            html = f"<small>{escape(label)}</small>"
            display({"text/html": html, "text/plain": f"── {label} ──"}, raw=True)
        with contextlib.suppress(KeyError):
            shown.data.pop("application/vnd.jupyter.widget-view+json")  # its comm is elsewhere
        display(shown.data, metadata=shown.metadata, raw=True)


def _beginning(text: str) -> str:
    """Return what is shown of a result: a page that gets a line of 5 MB stands still."""
    if len(text) <= _MAX_RESULT_CHARS:
        return text
    return f"{text[:_MAX_RESULT_CHARS]}… and {len(text) - _MAX_RESULT_CHARS:,} characters more"


def _gap(text: str) -> str:
    return "\n" if "\n" in text else " "
