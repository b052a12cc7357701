"""Dashboards without a front end: one line of text on a stream, or nothing; and their pace."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

from dtkit._text import summary_text, text_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RunView

    Clock = Callable[[], float]

__all__ = ["NullDashboard", "Pace", "TextDashboard"]

_TTY_INTERVAL_S = 1.0
_LINES_INTERVAL_S = 5.0
"""Where lines pile up: in files, and in the output of a notebook's cell."""
_MAX_REST_S = 5.0


class Pace:
    """Says when to draw next: not too often, and not for more than a share of a core.

    Args:
        interval_s: seconds from one drawing to the next, at least.
        clock: seconds that pass.
        cpu_clock: seconds that this thread computed.
        share: part of a core that drawing may take.
    """

    def __init__(
        self, interval_s: float, clock: Clock, cpu_clock: Clock, share: float = 0.05
    ) -> None:
        self._interval_s = interval_s
        self._share = share
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._next_s = clock()

    def is_due(self) -> bool:
        """Return whether the rest is over."""
        return self._clock() >= self._next_s

    def hurry(self) -> None:
        """End the rest: something was clicked. Safe to call from any thread."""
        self._next_s = self._clock()

    def run(self, draw: Callable[[], None]) -> None:
        """Draw, and rest in proportion to what it cost this thread."""
        before_s = self._cpu_clock()
        draw()
        cost_s = self._cpu_clock() - before_s
        rest_s = min(cost_s / self._share, _MAX_REST_S)
        self._next_s = self._clock() + max(self._interval_s, rest_s)


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

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
        cpu_clock: Clock = time.thread_time,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._is_tty = self._stream.isatty()
        interval_s = _TTY_INTERVAL_S if self._is_tty else _LINES_INTERVAL_S
        self._pace = Pace(interval_s, clock, cpu_clock)
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
