"""What stays of a run in the notebook: one card that needs no kernel, no widget, no script."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from dtkit._text import MAX_ROWS, OVER, summary_text
from dtkit.views import render
from dtkit.views.alt import alt_text
from dtkit.views.look import Look
from dtkit.views.staleness import staleness_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RunView

__all__ = ["card", "ranks_panel", "summary_bundle"]

_MAX_LOG_CHARS = 60_000
"""Kept in the notebook, over all ranks; the run's folder has everything."""
_MAX_LIVE_LOG_CHARS = 6_000
_FINAL_DPI = 200
"""Sharp on a dense screen, and with its palette still about 30 kB."""
_SECTION = "margin:0 0 10px 0"


def summary_bundle(
    view: RunView, blocks: Sequence[OutputBlock], *, log_scale: bool = False
) -> dict[str, object]:
    """Return the run as a MIME bundle: text/html, image/png (the chart alone) and text/plain.

    JupyterLab, Notebook, VS Code and nbconvert's HTML prefer the HTML; the PNG
    is for what cannot show HTML, nbconvert's PDF among it.
    """
    from dtkit.views.chart import Chart  # matplotlib takes half a second

    png = Chart(_FINAL_DPI).render(view, Look(log_scale=log_scale))
    return {
        "text/html": card(view, blocks, png),
        "image/png": base64.b64encode(png).decode(),
        "text/plain": summary_text(view, blocks),
    }


def card(view: RunView, blocks: Sequence[OutputBlock], png: bytes) -> str:
    """Return the run in one HTML block: state, numbers, chart, ranks, notes, logs.

    While the run goes on nothing in it folds, because drawing again would fold it.
    """
    is_live = view.state not in OVER
    source = base64.b64encode(png).decode()
    chart = (
        f'<img src="data:image/png;base64,{source}" alt="{escape(alt_text(view))}" '
        'width="740" style="max-width:100%;display:block;margin:0">'
    )
    max_chars = _MAX_LIVE_LOG_CHARS if is_live else _MAX_LOG_CHARS
    logs = render.log_blocks(blocks, len(view.ranks), max_chars=max_chars, is_live=is_live)
    sections = [
        render.state_line(view),
        render.error_text(view),
        render.tiles(view),
        render.metrics_line(view),
        chart,
        ranks_panel(view),
        _all_ranks(view) if not is_live else "",
        render.notes_list(view) if view.remarks else "",
        logs if blocks else "",
    ]
    body = "".join(f'<div style="{_SECTION}">{section}</div>' for section in sections if section)
    label = escape(f"run {view.name}: {view.state}")
    return f'<div role="group" aria-label="{label}" style="max-width:740px">{body}</div>'


def ranks_panel(view: RunView, *, is_full: bool = False) -> str:
    """Return the ranks, and how stale their steps are."""
    return render.ranks_table(view, is_full=is_full) + staleness_bars(view)


def _all_ranks(view: RunView) -> str:
    if len(view.ranks) <= MAX_ROWS:
        return ""
    table = render.ranks_table(view, is_full=True)
    return render.folded(f"all {len(view.ranks)} ranks", table)
