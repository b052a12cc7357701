"""A run in words: one line for a terminal, a plain summary, and the sentences in both."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from dtkit._format import (
    UNKNOWN,
    format_bytes,
    format_loss,
    format_ms,
    format_percent,
    format_rate,
    format_size,
    format_time,
)
from dtkit._ranks import format_ranks
from dtkit.events import OVER
from dtkit.output import tail
from dtkit.views.staleness import staleness_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RankView, RunView

__all__ = [
    "GLYPHS",
    "MAX_ROWS",
    "SLOW_RATIO",
    "format_metrics",
    "format_progress",
    "format_sent",
    "nonfinite_since",
    "peak_rank",
    "rate_per_rank",
    "slow_ranks",
    "slowdown",
    "summary_text",
    "telling_ranks",
    "text_line",
]

GLYPHS = {
    "starting": "○",
    "running": "●",
    "pausing": "❚❚",
    "paused": "❚❚",
    "stopping": "■",
    "stopped": "■",
    "finished": "✔",
    "failed": "✖",
    "lost": "✖",
}
MAX_ROWS = 8
"""Ranks shown one by one; of more, only the slowest, the median and the fastest."""

SLOW_RATIO = 1.5
"""A rank whose compute and data time is above so many medians is called slow."""

_NUM_NONFINITE = 3
"""So many steps without a finite loss are no accident: a GAN's every other step has none."""


def format_sent(view: RunView) -> str:
    """Return what a rank sends in a step, and of how much if it is compressed; "" if unknown."""
    if math.isnan(view.sent_bytes):
        return ""
    sent = format_bytes(view.sent_bytes)
    if view.sent_bytes >= view.raw_bytes:
        return f"{sent} sent"
    return f"{sent} sent for {format_bytes(view.raw_bytes)}"


def format_progress(view: RunView) -> str:
    """Return "131/400 · 0:07 < 0:14 · 20 it/s": steps, elapsed time < time left, pace."""
    is_known = view.total_steps and view.step <= view.total_steps
    steps = f"{view.step:,}/{view.total_steps:,}" if is_known else f"{view.step:,} steps"
    time = format_time(view.elapsed_s)
    if math.isfinite(view.eta_s) and view.state not in OVER:
        time += f" < {format_time(view.eta_s)}"
    return " · ".join(part for part in (steps, time, _pace(view.step_ms)) if part)


def format_metrics(view: RunView) -> str:
    """Return "lr 3.0e-04 · accuracy 0.7132": what the cell logged; of a stall, its reason."""
    if view.stall:
        return f"▲ stalled: {view.stall}"
    known = [f"lr {view.lr:.3g}"] if math.isfinite(view.lr) else []
    busy = [r.gpu_percent for r in view.ranks if math.isfinite(r.gpu_percent)]
    known += [f"GPU {statistics.fmean(busy):.0f} % busy"] if busy else []
    return " · ".join([*known, *(f"{k} {format_loss(v)}" for k, v in view.metrics.items())])


def rate_per_rank(view: RunView) -> str:
    """Return "1,264 per rank"; empty when there is one rank or no rate."""
    rate = view.samples_per_s
    if math.isnan(rate) or len(view.ranks) == 1:
        return ""
    return f"{format_rate(rate / len(view.ranks))} per rank"


def peak_rank(view: RunView) -> str:
    """Return "on rank 3": the one whose memory peak is the run's."""
    known = [r for r in view.ranks if math.isfinite(r.peak_gib)]
    return f"on rank {max(known, key=lambda r: r.peak_gib).rank}" if len(known) > 1 else ""


def nonfinite_since(view: RunView) -> int | None:
    """Return the step from which on the loss is NaN or infinite; None when it is not."""
    for num, value in enumerate(reversed(view.loss_curve.lines["raw"].tolist())):
        if math.isfinite(value):
            return int(view.loss_curve.step[-num]) if num >= _NUM_NONFINITE else None
    return None


def slowdown(view: RunView) -> dict[int, float]:
    """Return compute and data time against the ranks' median, for each rank where it is known."""
    busy_ms = {r.rank: r.compute_ms + r.data_ms for r in view.ranks if math.isfinite(r.step_ms)}
    if len(busy_ms) < 2:  # noqa: PLR2004  alone, nobody is slow
        return {}
    # The lower median: of two ranks it is the faster one, so that the other can be slow.
    median_ms = statistics.median_low(busy_ms.values())
    return {rank: ms / median_ms for rank, ms in busy_ms.items()} if median_ms > 0 else {}


def slow_ranks(view: RunView) -> list[int]:
    """Return the ranks that the others wait for."""
    return [rank for rank, ratio in slowdown(view).items() if ratio > SLOW_RATIO]


def telling_ranks(view: RunView) -> list[tuple[RankView, str]]:
    """Return the ranks to show with a word on why: all of few; of many the telling ones."""
    if len(view.ranks) <= MAX_ROWS:
        return [(rank, "") for rank in view.ranks]
    ratios = slowdown(view)
    order = sorted((r for r in view.ranks if r.rank in ratios), key=lambda r: ratios[r.rank])
    gone = [(r, "") for r in view.ranks if r.state in ("failed", "lost")]
    gone = gone[:4] if len(gone) < len(view.ranks) else []
    if not order:
        return gone or [(r, "") for r in view.ranks[:3]]
    rows = [(order[-1], "slowest"), (order[(len(order) - 1) // 2], "median"), (order[0], "fastest")]
    shown = {rank.rank for rank, _ in rows}
    return rows + [(r, why) for r, why in gone if r.rank not in shown]


def text_line(view: RunView) -> str:
    """Return the run in one line, for terminals and log files."""
    parts = [
        f"{GLYPHS.get(view.state, '●')} {view.state}",
        format_progress(view),
        f"loss {format_loss(view.loss)}",
        f"{format_rate(view.samples_per_s)} samples/s",
        f"comm {format_percent(view.comm_share)}",
    ]
    if view.stall:
        parts[-1] = f"▲ stalled: {view.stall}"
    since = nonfinite_since(view)
    if since is not None:
        parts[2] = f"✖ loss not finite since step {since:,}"
    return " · ".join(parts)


def summary_text(
    view: RunView, blocks: Sequence[OutputBlock], *, max_log_chars: int | None = 4000
) -> str:
    """Return the run as plain text of several lines.

    Args:
        view: the run.
        blocks: what the ranks printed.
        max_log_chars: how much of that is kept, the newest of each block; None for all.
    """
    about = "  ".join(part for part in (view.name, view.recipe) if part)
    numbers = (
        f"loss {format_loss(view.loss)} (best {format_loss(view.best_loss)})",
        f"{format_rate(view.samples_per_s)} samples/s",
        f"step {format_ms(view.step_ms)} ms",
        f"data wait {format_percent(view.data_share)}",
        ", ".join(filter(None, (f"comm {format_percent(view.comm_share)}", format_sent(view)))),
        f"peak memory {format_size(view.peak_gib)}",
    )
    lines = [f"{GLYPHS.get(view.state, '●')} {view.state}  {format_progress(view)}  {about}"]
    lines += [view.error] if view.error else []
    lines += [" · ".join(numbers)]
    metrics = format_metrics(view)
    lines += [metrics] if metrics else []
    lines += _table(view)
    stale = staleness_text(view)
    lines += [stale] if stale else []
    lines += [f"note: {text}" for text in view.remarks]
    for block in blocks:
        lines += [f"── {format_ranks(block.ranks, len(view.ranks))} ──"]
        keep = len(block.text) if max_log_chars is None else max_log_chars // len(blocks)
        lines += [tail(block.text, keep).rstrip("\n")]
    return "\n".join(line.rstrip() for line in lines)


def _table(view: RunView) -> list[str]:
    ratios = slowdown(view)
    rows = [("rank", "device", "step", "ms/step", "vs median", "samples/s", "memory", "state")]
    for rank, why in telling_ranks(view):
        ratio = ratios.get(rank.rank)
        rows.append((
            f"{rank.rank} {why}".rstrip(),
            view.place_of(rank) or UNKNOWN,
            f"{rank.step:,}",
            format_ms(rank.step_ms),
            f"{ratio:.2f} x{' slow' if ratio > SLOW_RATIO else ''}" if ratio else UNKNOWN,
            format_rate(rank.samples_per_s),
            format_size(rank.peak_gib),
            rank.state,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def _pace(step_ms: float) -> str:
    if not math.isfinite(step_ms) or step_ms <= 0:
        return ""
    per_s = 1000 / step_ms
    if per_s < 1:
        return f"{step_ms / 1000:.1f} s/it"
    return f"{per_s:,.0f} it/s" if per_s >= 10 else f"{per_s:.1f} it/s"  # noqa: PLR2004
