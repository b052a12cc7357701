"""HTML of a run as tests read it, and every kind of view that it is made of."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
from run_views import make_empty_view, make_rank, make_view, with_loss

from dtkit.output import OutputBlock
from dtkit.views import render
from dtkit.views.summary import card

if TYPE_CHECKING:
    from dtkit.telemetry import RunView

STATES = {
    "starting": "○ starting",
    "running": "● running",
    "pausing": "❚❚ pausing",
    "paused": "❚❚ paused",
    "stopping": "■ stopping",
    "stopped": "■ stopped",
    "finished": "✔ finished",
    "failed": "✖ failed",
}
BLOCKS = (OutputBlock((0,), "epoch 1\nsaved\n"), OutputBlock((1, 2, 3), "epoch 1\n"))
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = ("img",)
TAGS = {
    "b", "details", "div", "img", "li", "pre", "span", "summary", "table", "tbody", "td", "th",
    "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {"alt", "aria-label", "aria-valuenow", "open", "role", "scope", "src", "style",
              "title", "width"}  # fmt: skip


class Document(HTMLParser):
    """Well-formed HTML: its text, and every tag and attribute in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its attributes."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes the innermost open tag."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note the text."""
        self.words.append(data)

    def of(self, name: str) -> list[str]:
        """Return the values of an attribute, wherever it occurs."""
        return [value for attribute, value in self.attributes if attribute == name]


def rows_of(html: str) -> list[list[str]]:
    """Return the text of a table's body, row by row."""
    body = html[html.index("<tbody>") :]
    return [
        [Document(cell).text for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr.*?</tr>", body)
    ]


def every_html(view: RunView, blocks: tuple[OutputBlock, ...] = BLOCKS) -> str:
    png = b"not looked at"
    return "".join([
        card(view, blocks, png),
        render.ranks_table(view, is_full=True),
        render.notes_list(view),
        render.log_blocks(blocks, 4, max_chars=1000, is_live=True),
        render.log_blocks(blocks, 4, max_chars=1000, is_live=False),
    ])  # fmt: skip


def every_view() -> list[RunView]:
    slow = (*make_view().ranks[:3], make_rank(3, compute_ms=90.0, state="lost"))
    return [
        *(make_view(state=state) for state in STATES),
        *(make_view(num_ranks) for num_ranks in (1, 2, 9, 64)),
        make_view(ranks=slow, best_loss=0.1, state="failed", error="rank 3 is gone"),
        with_loss(make_view(), np.full(200, math.nan)),
        with_loss(make_view(), np.append(np.ones(195), np.full(5, math.nan))),
        make_empty_view(1),
        make_empty_view(9),
    ]
