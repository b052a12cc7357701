"""What stays of a run in the notebook: one card that needs no kernel, no widget, no script."""

from __future__ import annotations

import base64
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import OVER
from dtkit.views import render
from dtkit.views.alt import alt_text
from dtkit.views.look import FIRST, Look
from dtkit.views.staleness import staleness_bars
from dtkit.views.words import MAX_ROWS, summary_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dtkit.output import OutputBlock
    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView
    from dtkit.views.chart import Chart

__all__ = ["card", "ranks_panel", "summary_bundle"]

_MAX_LOG_CHARS = 60_000
"""Kept in the notebook, over all ranks; the run's folder has everything."""
_MAX_LIVE_LOG_CHARS = 6_000
_FINAL_DPI = 200
"""Sharp on a dense screen, and with its palette still about 30 kB."""
_MAX_MORE_CHARTS = 8
"""About 15 kB each in the notebook; `history` has all."""
_SECTION = "margin:0 0 10px 0"
_NO_STEP = (
    '<div style="font-size:13px">no optimizer made a step; '
    "a cell that does not train runs under %%dist</div>"
)


def summary_bundle(
    view: RunView,
    blocks: Sequence[OutputBlock],
    curves: Mapping[str, Curve] | None = None,
    *,
    log_scale: bool = False,
) -> dict[str, object]:
    """Return the run as a MIME bundle: text/html, image/png (the chart alone) and text/plain.

    JupyterLab, Notebook, VS Code and nbconvert's HTML prefer the HTML; the PNG
    is for what cannot show HTML, nbconvert's PDF among it.

    Args:
        view: the run.
        blocks: what the ranks printed.
        curves: all that can be drawn; what is not in the chart is in more of them, folded.
        log_scale: of the losses.
    """
    from dtkit.views.chart import Chart  # matplotlib takes half a second

    if view.state in OVER and not view.step:
        return {"text/html": card(view, blocks, b""), "text/plain": summary_text(view, blocks)}
    chart, look = Chart(_FINAL_DPI), Look(log_scale=log_scale)
    png = chart.render(view, look)
    return {
        "text/html": card(view, blocks, png, _more_charts(chart, view, curves or {}, look)),
        "image/png": base64.b64encode(png).decode(),
        "text/plain": summary_text(view, blocks),
    }


def card(view: RunView, blocks: Sequence[OutputBlock], png: bytes, more_charts: str = "") -> str:
    """Return the run in one HTML block: state, numbers, chart, ranks, notes, logs.

    While the run goes on nothing in it folds, because drawing again would fold it. Of one that
    ended without a step, it says that instead of numbers.
    """
    is_live = view.state not in OVER
    max_chars = _MAX_LIVE_LOG_CHARS if is_live else _MAX_LOG_CHARS
    logs = render.log_blocks(blocks, len(view.ranks), max_chars=max_chars, is_live=is_live)
    numbers = [
        render.tiles(view),
        render.metrics_line(view),
        _picture(png, alt_text(view)),
        more_charts if not is_live else "",
        ranks_panel(view),
        _all_ranks(view) if not is_live else "",
    ]
    sections = [
        render.state_line(view),
        render.error_text(view),
        *(numbers if is_live or view.step else ["" if view.error else _NO_STEP]),
        render.notes_list(view) if view.remarks else "",
        logs if blocks else "",
    ]
    body = "".join(f'<div style="{_SECTION}">{section}</div>' for section in sections if section)
    label = escape(f"run {view.name}: {view.state}")
    return f'<div role="group" aria-label="{label}" style="max-width:740px">{body}</div>'


def ranks_panel(view: RunView, *, is_full: bool = False) -> str:
    """Return the ranks, and how stale their steps are."""
    return render.ranks_table(view, is_full=is_full) + staleness_bars(view)


def _picture(png: bytes, words: str) -> str:
    source = base64.b64encode(png).decode()
    return (
        f'<img src="data:image/png;base64,{source}" alt="{escape(words)}" '
        'width="740" style="max-width:100%;display:block;margin:0">'
    )


def _more_charts(chart: Chart, view: RunView, curves: Mapping[str, Curve], look: Look) -> str:
    """Return pictures of what the first one does not show, two charts in each."""
    names = [name for name, curve in curves.items() if name not in FIRST and _tells(curve)]
    shown = names[:_MAX_MORE_CHARTS]
    if not shown:
        return ""
    if len(shown) % 2:
        shown.append(FIRST[0])  # to compare it with

    def pictures() -> Iterator[str]:
        for pair in zip(shown[::2], shown[1::2], strict=True):
            png = chart.render(view, replace(look, names=pair), curves)
            yield _picture(png, alt_text(view, pair, curves))

    label = "more charts: " + ", ".join(names[:_MAX_MORE_CHARTS])
    if (rest := len(names) - _MAX_MORE_CHARTS) > 0:
        label += f" (and {rest} more, of which the history has the numbers)"
    return render.folded(escape(label), "".join(pictures()))


def _tells(curve: Curve) -> bool:
    """Whether a line of it is more than one number."""
    return any(len(np.unique(line[np.isfinite(line)])) > 1 for line in curve.lines.values())


def _all_ranks(view: RunView) -> str:
    if len(view.ranks) <= MAX_ROWS:
        return ""
    table = render.ranks_table(view, is_full=True)
    return render.folded(f"all {len(view.ranks)} ranks", table)
