"""The newest steps of a timeline as a picture: a row per rank, a colour per phase."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from dtkit.trace.rows import PHASES, names_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dtkit.trace.rows import RankTrace

__all__ = ["COLOURS", "FLYING", "NUM_STEPS", "alt_text", "draw"]

NUM_STEPS = 4
"""More would be too narrow to tell apart: the trace is for that."""
COLOURS = dict(zip(PHASES, ("#CC79A7", "#0072B2", "#56B4E9", "#D55E00", "#009E73"), strict=True))
FLYING = "#595959"
_MAX_RANKS = 16
_GRID = "#E3E3E3"


def draw(traces: Sequence[RankTrace], title: str) -> bytes:
    """Return the last steps that all ranks have as PNG; white, opaque."""
    from matplotlib import style  # half a second: only when drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = traces[:_MAX_RANKS]
    with style.context("default"):
        figure = Figure(figsize=(7.4, 1.1 + 0.34 * len(shown)), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw_rows(axes, shown)
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
        handles.append(Patch(color=FLYING, label="collective under way"))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False
        )
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def alt_text(traces: Sequence[RankTrace]) -> str:
    """Return what the picture shows, in words."""
    numbers = _newest(traces)
    if not numbers:
        return "No step that all ranks have."
    ranks = f"{len(traces)} rank{'' if len(traces) == 1 else 's'}"
    return f"Phases of {ranks} in steps {numbers[0]} to {numbers[-1]}, over milliseconds."


def _draw_rows(axes: Axes, traces: Sequence[RankTrace]) -> None:
    numbers = set(_newest(traces))
    kept = {t.head.rank: [s for s in t.steps if s.number in numbers] for t in traces}
    zero_ns = min((steps[0].start_ns for steps in kept.values() if steps), default=0)
    for row, steps in enumerate(kept.values()):
        for phase, name in enumerate(PHASES):
            bars = [
                ((s.start_ns - zero_ns) / 1e6, (s.end_ns - s.start_ns) / 1e6)
                for step in steps
                for s in step.spans
                if s.phase == phase
            ]
            axes.broken_barh(bars, (row - 0.32, 0.5), facecolors=COLOURS[name])
        flying = [
            ((c.call_ns - zero_ns) / 1e6, (c.done_ns - c.call_ns) / 1e6)
            for step in steps
            for c in step.collectives
            if c.done_ns
        ]
        axes.broken_barh(flying, (row + 0.22, 0.12), facecolors=FLYING)
        for step in steps:
            axes.plot(
                [(step.start_ns - zero_ns) / 1e6] * 2,
                [row - 0.4, row + 0.4],
                color="#333333",
                lw=0.5,
            )
    names = names_of(traces)
    axes.set_yticks(range(len(kept)), [names[rank].replace(" on ", "\n") for rank in kept])
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(visible=True, axis="x", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _newest(traces: Sequence[RankTrace]) -> list[int]:
    """Return the last steps that all ranks have."""
    if not traces:
        return []
    common = set.intersection(*({step.number for step in t.steps} for t in traces))
    return sorted(common)[-NUM_STEPS:]
