"""A run as HTML: pure functions of a `RunView`, used live and in the static summary.

What an untrusted notebook strips is not used: no script, no SVG, no style
sheet. Inline styles only, and tables for what must line up. Where JupyterLab's
sanitizer drops a `var()` colour, the text keeps the colour around it, which is
readable. All text that is not ours is escaped.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from dtkit._format import format_loss, format_ms, format_percent, format_rate, format_size
from dtkit._ranks import format_ranks
from dtkit.output import tail
from dtkit.views.look import BLUE, GREEN, PURPLE, VERMILION, unbroken
from dtkit.views.words import (
    GLYPHS,
    SLOW_RATIO,
    format_metrics,
    format_progress,
    format_sent,
    nonfinite_since,
    peak_rank,
    rate_per_rank,
    slowdown,
    telling_ranks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RankView, RunView

__all__ = [
    "error_text",
    "folded",
    "log_blocks",
    "metrics_line",
    "notes_list",
    "ranks_table",
    "state_line",
    "tiles",
]

_COLOURS = {
    "paused": PURPLE,
    "pausing": PURPLE,
    "stopping": VERMILION,
    "stopped": VERMILION,
    "failed": VERMILION,
    "lost": VERMILION,
    "finished": GREEN,
}
_MUTED = "color:var(--jp-ui-font-color2,#767676)"
_LINE = "var(--jp-border-color2,#767676)"
_TEXT = (
    "font-family:var(--jp-ui-font-family,system-ui,sans-serif);"
    "color:var(--jp-ui-font-color1,inherit);font-size:13px;line-height:20px"
)
_ONE_LINE = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
_PRE = (
    "background:rgba(127,127,127,0.1);margin:2px 0 8px 0;padding:6px 8px;"
    "font-size:12px;line-height:17px;"
    "font-family:var(--jp-code-font-family,monospace);color:var(--jp-ui-font-color1,inherit)"
)


def state_line(view: RunView) -> str:
    """Return the state, how far it is, and a bar."""
    about = escape(" · ".join(part for part in (view.name, view.recipe) if part))
    return (
        f'<div style="{_TEXT};display:flex">'
        f'<span style="width:88px;flex:none;{_ONE_LINE}">{_state(view.state, bold=True)}</span>'
        f'<span style="flex:none;font-variant-numeric:tabular-nums">'
        f"{escape(format_progress(view))}</span>"
        f'<span title="{about}" style="flex:1;min-width:0;margin-left:16px;text-align:right;'
        f'{_MUTED};{_ONE_LINE}">{about}</span></div>{_bar(view)}'
    )


def tiles(view: RunView) -> str:
    """Return the six numbers of a run in one row, each with a line that says how to read it."""
    cells = "".join(
        f'<td style="padding:0 4px 0 0;border:none;text-align:left;vertical-align:top;{_ONE_LINE}">'
        f'<div style="font-size:11px;line-height:16px;{_MUTED}">{label}</div>'
        f'<div style="font-size:18px;line-height:24px;font-weight:600;{_ONE_LINE}">'
        f"{value}</div>"
        f'<div style="font-size:11px;line-height:16px;{_MUTED};{_ONE_LINE}">'
        f"{reading or '&nbsp;'}</div></td>"
        for label, value, reading in _tiles(view)
    )
    return (
        f'<table aria-label="numbers of the run" style="{_TEXT};{_TABLE}">'
        f'<tr style="background:transparent">{cells}</tr></table>'
    )


def metrics_line(view: RunView) -> str:
    """Return the learning rate and what the cell logged, in one line."""
    text = escape(format_metrics(view)) or "&nbsp;"
    style = f"{_TEXT};font-size:12px;line-height:18px;font-variant-numeric:tabular-nums"
    return f'<div title="{text}" style="{style};{_ONE_LINE}">{text}</div>'


def ranks_table(view: RunView, *, is_full: bool = False) -> str:
    """Return one row per rank; of many ranks only the telling ones, unless `is_full`."""
    rows = [(rank, "") for rank in view.ranks] if is_full else telling_ranks(view)
    ratios = slowdown(view)
    has_why = any(why for _, why in rows)
    head = "".join(
        f'<th scope="col" title="{title}" style="width:{wide if has_why else width}%;'
        f'{_cell(align)};font-weight:normal;border-bottom:1px solid {_LINE};{_MUTED}">{name}</th>'
        for name, width, wide, align, title in _COLUMNS
    )
    body = "".join(
        _row(rank, why, ratios.get(rank.rank, math.nan), view.place_of(rank)) for rank, why in rows
    )
    return (
        f'<table style="{_TEXT};font-size:12px;{_TABLE}">'
        f'<thead style="border:none"><tr style="background:transparent">{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def notes_list(view: RunView) -> str:
    """Return what dtkit did to the cell, and what was changed by hand, one item each."""
    if not view.remarks:
        return f'<div style="{_TEXT};{_MUTED}">nothing to note</div>'
    items = "".join(
        f'<li style="margin:0 0 4px 0">{unbroken(escape(text))}</li>' for text in view.remarks
    )
    return f'<ul style="{_TEXT};margin:0;padding:0 0 0 20px">{items}</ul>'


def error_text(view: RunView) -> str:
    """Return why the run failed; empty when it did not."""
    if not view.error:
        return ""
    return (
        f'<pre style="{_PRE};border-left:4px solid {VERMILION};white-space:pre-wrap;'
        f'max-height:260px;overflow:auto">{escape(view.error)}</pre>'
    )


def log_blocks(
    blocks: Sequence[OutputBlock], world_size: int, *, max_chars: int, is_live: bool
) -> str:
    """Return what the ranks printed.

    Args:
        blocks: the texts, equal ones merged.
        world_size: number of ranks, so that "all ranks" can be said.
        max_chars: text kept over all blocks together, the newest of each.
        is_live: draw it open and without scroll bars of its own: what is drawn
            again several times a second can remember neither.
    """
    if not blocks:
        return f'<div style="{_TEXT};{_MUTED}">no rank printed anything</div>'
    keep = max(1000, max_chars // len(blocks))
    parts = []
    for i, block in enumerate(blocks):
        label = escape(format_ranks(block.ranks, world_size))
        text = escape(tail(block.text, keep))
        if is_live:
            parts.append(f'{_label(label)}<pre style="{_PRE};white-space:pre-wrap">{text}</pre>')
        else:
            parts.append(_static_block(label, text, len(blocks), is_open=i == 0))
    return "".join(parts)


def folded(label: str, body: str, *, is_open: bool = False) -> str:
    """Return HTML behind a heading that opens it; `label` is HTML too."""
    return (
        f'<details style="{_TEXT}"{" open" if is_open else ""}>'
        f'<summary style="cursor:pointer">{label}</summary>{body}</details>'
    )


_TABLE = (
    "width:100%;table-layout:fixed;border-collapse:collapse;border:none;margin:0;"
    "font-variant-numeric:tabular-nums"
)
_COLUMNS = (
    # heading, width in % (and where the rank says why it is shown), alignment, what it means
    ("rank", 6, 11, "left", ""),
    ("device", 10, 8, "left", ""),
    ("step", 8, 7, "right", ""),
    ("ms/step", 8, 8, "right", "median of the last 50 steps"),
    ("compute", 9, 9, "right", "ms of a step: neither data nor communication"),
    ("data", 7, 6, "right", "ms of a step spent waiting for data"),
    ("comm", 7, 7, "right", "ms of a step spent waiting for gradients of other ranks"),
    ("vs median", 14, 14, "right", "compute + data against the ranks' median"),
    ("samples/s", 10, 10, "right", "of this rank alone"),
    ("memory", 10, 9, "right", "peak of the run"),
    ("state", 11, 11, "left", ""),
)


def _state(state: str, *, bold: bool = False) -> str:
    colour = _COLOURS.get(state, BLUE)
    word = f"<b>{escape(state)}</b>" if bold else escape(state)
    return f'<span style="color:{colour}">{GLYPHS.get(state, "●")}</span> {word}'


def _bar(view: RunView) -> str:
    done = min(1.0, view.step / view.total_steps) if view.total_steps else 0.0
    if view.state == "finished":
        done = 1.0
    colour = _COLOURS.get(view.state, BLUE)
    return (
        f'<div role="progressbar" aria-label="steps" aria-valuenow="{100 * done:.0f}" '
        f'style="height:4px;margin:4px 0 0 0;border-radius:2px;overflow:hidden;'
        f'background:rgba(127,127,127,0.25)">'
        f'<div style="height:4px;width:{100 * done:.1f}%;background:{colour}"></div></div>'
    )


def _tiles(view: RunView) -> tuple[tuple[str, str, str], ...]:
    """Return label, value and how to read it, six times."""
    data, comm = view.data_share * view.step_ms, view.comm_share * view.step_ms
    compute = 1 - view.data_share - view.comm_share
    return (
        ("loss", format_loss(view.loss), _loss_reading(view)),
        ("samples/s", format_rate(view.samples_per_s), rate_per_rank(view)),
        ("step", f"{format_ms(view.step_ms)} ms", f"{format_percent(compute)} compute"),
        ("data wait", format_percent(view.data_share), f"{format_ms(data)} ms of a step"),
        (
            "comm",
            format_percent(view.comm_share),
            format_sent(view) or f"{format_ms(comm)} ms of a step",
        ),
        ("peak memory", format_size(view.peak_gib), peak_rank(view)),
    )


def _loss_reading(view: RunView) -> str:
    since = nonfinite_since(view)
    if since is not None:
        return f'<span style="color:{VERMILION}">✖</span> NaN/∞ since {since:,}'
    if math.isnan(view.loss) or math.isnan(view.best_loss):
        return ""
    if view.loss <= view.best_loss + 0.005 * abs(view.best_loss):
        return f'<span style="color:{GREEN}">▼</span> best so far'
    return f'<span style="color:{VERMILION}">▲</span> best {format_loss(view.best_loss)}'


def _row(rank: RankView, why: str, ratio: float, device: str) -> str:
    where = escape(f"{rank.host}, process {rank.pid}")
    # Without a step the compute time says 0, which is not what it was.
    compute_ms = math.nan if math.isnan(rank.step_ms) else rank.compute_ms
    values = (
        f'{rank.rank} <span style="{_MUTED}">{why}</span>' if why else f"{rank.rank}",
        f'<span title="{where}">{escape(device) or "–"}</span>',
        f"{rank.step:,}",
        *map(format_ms, (rank.step_ms, compute_ms, rank.data_ms, rank.comm_ms)),
        _versus(ratio),
        format_rate(rank.samples_per_s),
        format_size(rank.peak_gib),
        _state(rank.state),
    )
    cells = "".join(
        f'<td style="{_cell(align)}">{value}</td>'
        for (_, _, _, align, _), value in zip(_COLUMNS, values, strict=True)
    )
    return f'<tr style="background:transparent">{cells}</tr>'


def _versus(ratio: float) -> str:
    if math.isnan(ratio):
        return "–"
    mark = f'<span style="color:{VERMILION}">▲</span> slow ' if ratio > SLOW_RATIO else ""
    return f"{mark}{ratio:.2f} ×"


def _cell(align: str) -> str:
    # Short, because a table of many ranks has a thousand cells; numbers always fit.
    style = f"padding:4px;line-height:16px;text-align:{align};white-space:nowrap"
    return style if align == "right" else f"{style};overflow:hidden;text-overflow:ellipsis"


def _label(label: str) -> str:
    return f'<div style="{_TEXT};{_MUTED}">{label}</div>'


def _static_block(label: str, text: str, num_blocks: int, *, is_open: bool) -> str:
    pre = f'<pre style="{_PRE};white-space:pre-wrap;max-height:220px;overflow:auto">{text}</pre>'
    if num_blocks == 1:
        return f"{_label(label)}{pre}"
    return folded(label, pre, is_open=is_open)
