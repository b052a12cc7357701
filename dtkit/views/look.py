"""What is chosen of a run's charts, and how lines are told apart: the same for every renderer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from dtkit.telemetry.view import Curve, RunView

__all__ = ["BLUE", "COLOURS", "DASHES", "FIRST", "GREEN", "PURPLE", "RUN_COLOURS",
           "RUN_STYLES", "VERMILION", "Look",
           "curves_in", "rows_of", "unbroken"]  # fmt: skip

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Okabe and Ito's colours with a contrast of at least 3:1 on white and on #111111."""

RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#595959", "#56B4E9")
RUN_STYLES = ("-", "--", "-.", ":")
"""Of several runs' lines in one picture."""

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#8A6D00", "#767676", "#9E5FBF")
DASHES = ((), (6, 3), (2, 2), (10, 3, 2, 3), (4, 4), (1, 3), (8, 2))
"""In pixels; the browser's are in `live/chart.js`."""
FIRST = ("loss", "samples/s")
"""The charts that stand there until others are chosen."""
_NUM_ROWS = 3
_OPTION = re.compile(r"--[\w-]+(?: [\w.:]+)?")


@dataclass(frozen=True, slots=True)
class Look:
    """How the charts are looked at.

    Attributes:
        names: what is drawn, on the left and on the right.
        log_scale: of all but throughput, which is compared with zero.
        smoothing: weight of the past in one more line, 0 (none) to 1.
        part: of the steps so far, the newest are drawn: 1 is all.
    """

    names: tuple[str, str] = FIRST
    log_scale: bool = False
    smoothing: float = 0.0
    part: float = 1.0

    def drawn(self, known: Container[str]) -> tuple[str, str]:
        """Return what is drawn where these are known; for another, what stands there first."""
        left, right = self.names
        return left if left in known else FIRST[0], right if right in known else FIRST[1]


def curves_in(view: RunView) -> dict[str, Curve]:
    """Return the two charts that a view has the numbers of."""
    return dict(zip(FIRST, (view.loss_curve, view.rate_curve), strict=True))


def rows_of(spans: Sequence[tuple[float, float]]) -> list[int | None]:
    """Return in which row each text stands so that none is over another; None: there is no room.

    Args:
        spans: from where to where each reaches.
    """
    ends = [float("-inf")] * _NUM_ROWS
    found: list[int | None] = []
    for start, end in spans:
        row = next((i for i, taken in enumerate(ends) if start >= taken), None)
        if row is not None:
            ends[row] = end
        found.append(row)
    return found


def unbroken(html: str) -> str:
    """Return HTML in which options stay in one line: browsers break lines after hyphens."""
    return _OPTION.sub(r'<span style="white-space:nowrap">\g<0></span>', html)
