"""Dashboards without a front end: one line of text on a stream, or nothing."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, TextIO

from dtkit.views.pace import Budget, Pace
from dtkit.views.words import summary_text, text_line

if TYPE_CHECKING:
    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RunView

__all__ = ["NullDashboard", "TextDashboard"]

_TTY_INTERVAL_S = 1.0
_LINES_INTERVAL_S = 5.0
"""Where lines pile up: in files, and in the output of a notebook's cell."""


class NullDashboard:
    """Shows nothing."""

    def start(self, view: RunView) -> None:
        """Show nothing."""

    def is_due(self) -> bool:
        """Return False."""
        return False

    def update(self, view: RunView, blocks: tuple[OutputBlock, ...]) -> None:
        """Show nothing."""

    def finish(self, view: RunView, blocks: tuple[OutputBlock, ...]) -> None:
        """Show nothing."""


class TextDashboard:
    """One line that is written again on a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None, budget: Budget | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._is_tty = self._stream.isatty()
        interval_s = _TTY_INTERVAL_S if self._is_tty else _LINES_INTERVAL_S
        self._pace = Pace(interval_s, budget or Budget())
        self._line = ""
        self._is_over = False

    def start(self, view: RunView) -> None:
        """Write the first line."""
        self._pace.run(lambda: self._write(text_line(view)))

    def is_due(self) -> bool:
        """Return whether the line may be written again."""
        return not self._is_over and self._pace.is_due()

    def update(self, view: RunView, blocks: tuple[OutputBlock, ...]) -> None:
        """Write the line; what the ranks printed follows at the end."""
        del blocks
        if self.is_due():
            self._pace.run(lambda: self._write(text_line(view)))

    def finish(self, view: RunView, blocks: tuple[OutputBlock, ...]) -> None:
        """Write the summary with all that the ranks printed."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_tty:
            self._write("")
        self._stream.write(summary_text(view, blocks, max_log_chars=None) + "\n")
        self._stream.flush()

    def _write(self, line: str) -> None:
        if self._is_tty:
            line = line[: shutil.get_terminal_size().columns - 1]
        if line == self._line:
            return
        if self._is_tty:
            self._stream.write(f"\r{line:<{len(self._line)}}\r{line}")
        else:
            self._stream.write(line + "\n")
        self._line = line
        self._stream.flush()
