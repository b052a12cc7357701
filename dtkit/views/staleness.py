"""The staleness of a run's steps as bars: HTML without script or style sheet, as in `_render`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.views.look import BLUE

if TYPE_CHECKING:
    from dtkit.telemetry.view import RunView

__all__ = ["staleness_bars", "staleness_text"]

_MAX_BARS = 12
_HEIGHT_PX = 40
_MUTED = "color:var(--jp-ui-font-color2,#767676)"


def staleness_text(view: RunView) -> str:
    """Return the mean and the largest staleness in words; empty in step."""
    total = sum(num for _, num in view.staleness)
    if not total:
        return ""
    mean = sum(value * num for value, num in view.staleness) / total
    return (
        f"staleness {mean:.1f} on average, {view.staleness[-1][0]} at most: updates of other "
        "ranks that a step was computed without"
    )


def staleness_bars(view: RunView) -> str:
    """Return a histogram; empty in step."""
    if not view.staleness:
        return ""
    total = sum(num for _, num in view.staleness)
    bars = _bars(view)
    most = max(num for _, num in bars)
    cells = "".join(
        f'<td style="padding:0 2px;border:none;text-align:center;vertical-align:bottom;'
        f'line-height:14px">{100 * num / total:.0f} %<div style="height:'
        f'{max(1, round(_HEIGHT_PX * num / most))}px;background:{BLUE}"></div>{label}</td>'
        for label, num in bars
    )
    return (
        f'<table aria-label="staleness of steps" style="font-size:11px;border:none;margin:6px 0 0;'
        f'table-layout:fixed;width:100%"><tr style="background:transparent">{cells}</tr></table>'
        f'<div style="font-size:11px;{_MUTED}">{staleness_text(view)}</div>'
    )


def _bars(view: RunView) -> list[tuple[str, int]]:
    """Return a bar per value, or per range of values where they are many."""
    counts, highest = dict(view.staleness), view.staleness[-1][0]
    width = -(-(highest + 1) // _MAX_BARS)
    bars = []
    for low in range(0, highest + 1, width):
        label = f"{low}" if width == 1 else f"{low}–{low + width - 1}"
        bars.append((label, sum(counts.get(v, 0) for v in range(low, low + width))))
    return bars
