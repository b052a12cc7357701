"""What the ranks print: terminal semantics per rank, identical text merged over ranks."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_CHARS", "Display", "OutputBlock", "RankOutput", "merge_output", "tail"]

MAX_CHARS = 200_000
"""Text kept per rank and cell; of more, the newest is kept and the cut is said."""

_UP = "\x1b[A"
_ANSI = re.compile(r"\x1b\[(?!A)[0-9;?]*[A-Za-z]")
_CONTROL = re.compile(r"([\n\r\b]|\x1b\[A)")
_NOT_SHOWN = re.compile(
    r"… (?:([\d,]+) earlier lines)?(?: and )?(?:([\d,]+) earlier characters)? are not shown\n"
)


@dataclass(frozen=True, slots=True)
class OutputBlock:
    """Text that exactly these ranks printed."""

    ranks: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Display:
    """A rich output (figure, table) that exactly these ranks showed."""

    ranks: tuple[int, ...]
    data: dict[str, Any]  # by MIME type, as Jupyter sends it
    metadata: dict[str, Any]


class RankOutput:
    r"""The text of one rank, with `\r`, `\b` and cursor up as on a terminal (tqdm needs them)."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._line: list[str] = []
        self._below: list[list[str]] = []
        """Lines under that of the cursor, the next one last."""
        self._column = 0
        self._num_chars = 0
        self._num_cut = 0
        self._num_cut_chars = 0

    def write(self, text: str) -> None:
        """Append text; a carriage return goes back to the start of the line."""
        for piece in _CONTROL.split(_ANSI.sub("", text)):
            if piece == "\n":
                self._end_line()
            elif piece == "\r":
                self._column = 0
            elif piece == "\b":
                self._column = max(0, self._column - 1)
            elif piece == _UP:
                self._go_up()
            elif piece:
                self._put(piece)

    def clear(self) -> None:
        """Forget everything, as `clear_output` does."""
        self._lines.clear()
        self._line.clear()
        self._below.clear()
        self._column = self._num_chars = self._num_cut = self._num_cut_chars = 0

    @property
    def text(self) -> str:
        """Everything printed so far; of more than `MAX_CHARS` characters the newest."""
        note = _not_shown(self._num_cut, self._num_cut_chars)
        below = "".join("\n" + "".join(line) for line in reversed(self._below))
        return note + "".join(self._lines) + "".join(self._line) + below

    def _put(self, piece: str) -> None:
        # A list of characters takes 8 bytes for each: a line of 50 MB must not become one.
        num_over = self._column + len(piece) - MAX_CHARS
        if num_over > 0:
            self._num_cut_chars += num_over
            del self._line[:num_over]
            self._column = max(0, self._column - num_over)
            piece = piece[-MAX_CHARS:]
        end = self._column + len(piece)
        self._line[self._column : end] = piece
        self._column = end

    def _go_up(self) -> None:
        if self._lines:
            self._below.append(self._line)
            line = self._lines.pop()
            self._num_chars -= len(line)
            self._line = list(line[:-1])

    def _end_line(self) -> None:
        line = "".join(self._line) + "\n"
        self._line = self._below.pop() if self._below else []
        self._column = 0
        self._lines.append(line)
        self._num_chars += len(line)
        while self._num_chars > MAX_CHARS and len(self._lines) > 1:
            self._num_chars -= len(self._lines.popleft())
            self._num_cut += 1


def tail(text: str, max_chars: int) -> str:
    """Return the newest whole lines of `text` within `max_chars`, saying what is left out.

    What had been left out of it before is counted along.
    """
    if len(text) <= max_chars:
        return text
    num_lines, num_chars = 0, 0
    if before := _NOT_SHOWN.match(text):
        num_lines, num_chars = (int((found or "0").replace(",", "")) for found in before.groups())
        text = text[before.end() :]
    cut = text[-max_chars:]
    cut = cut[cut.find("\n") + 1 :]
    num_lines += text.count("\n", 0, len(text) - len(cut))
    return _not_shown(num_lines, num_chars) + cut


def _not_shown(num_lines: int, num_chars: int) -> str:
    parts = ((num_lines, "lines"), (num_chars, "characters"))
    cut = [f"{num:,} earlier {noun}" for num, noun in parts if num]
    return f"… {' and '.join(cut)} are not shown\n" if cut else ""


def merge_output(outputs: Mapping[int, RankOutput]) -> tuple[OutputBlock, ...]:
    """Return the ranks' texts with equal ones merged, in order of their lowest rank.

    Ranks that printed nothing are left out.
    """
    by_text: dict[str, list[int]] = {}
    for rank in sorted(outputs):
        text = outputs[rank].text
        if text.strip():
            by_text.setdefault(text, []).append(rank)
    return tuple(OutputBlock(tuple(ranks), text) for text, ranks in by_text.items())
