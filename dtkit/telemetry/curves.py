"""What can be drawn of a run, each with the lines in it: for renderers that let one choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import STEP_COLUMNS
from dtkit.telemetry._series import WINDOW, binned, decimate, median_of_known
from dtkit.telemetry.news import ratio
from dtkit.telemetry.view import MAX_POINTS, Curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dtkit.telemetry._series import RankSeries, Rows

    Floats = NDArray[np.float64]

__all__ = ["curves_of", "loss_curve", "rate_curve"]

MAX_LINES = 7
"""Of more ranks than this, the slowest, the median and the fastest are drawn."""
_RANK_POINTS = 300
_STEP_AND_MS = np.array([[STEP_COLUMNS.index("step")], [STEP_COLUMNS.index("step_ms")]])


def loss_curve(rows: Rows) -> Curve:
    """Return the loss of merged steps, and what it is smoothed."""
    keep = decimate(rows.num)
    return Curve(rows["step"][keep], {"raw": rows["loss"][keep], "smoothed": rows["smooth"][keep]})


def rate_curve(rows: Rows) -> Curve:
    """Return samples/s of all ranks, and the slowest and the fastest rank's times their number."""
    step, rate, low, high = binned(rows, MAX_POINTS // 2)
    return Curve(step, {"all ranks": rate, "slowest": low, "fastest": high})


def curves_of(
    rows: Rows,
    logged: Mapping[str, Mapping[int, tuple[float, float]]],
    ranks: Sequence[RankSeries],
) -> dict[str, Curve]:
    """Return every chart that there is something to draw in, by its name.

    Args:
        rows: the merged steps.
        logged: by metric and step, the sum over the ranks and how many they were.
        ranks: what each of them did lately.
    """
    keep = decimate(rows.num)
    step = rows["step"][keep]
    found = {
        "loss": loss_curve(rows),
        "samples/s": rate_curve(rows),
        "ms of a step": Curve(
            step,
            {
                "step": rows["step_ms"][keep],
                "data wait": rows["data_ms"][keep],
                "communication": rows["comm_ms"][keep],
            },
        ),
        "ms of a step by rank": _by_rank(ranks),
        "GPU busy %": _of_gpus(ranks, 1),
        "GPU memory GiB": _of_gpus(ranks, 2),
        "learning rate": Curve(step, {"learning rate": rows["lr"][keep]}),
    }
    for name, values in logged.items():
        steps = list(values)
        steps = sorted(steps[i] for i in decimate(len(steps)))
        mean = np.array([ratio(*values[s]) for s in steps], dtype=np.float64)
        label = name if name not in found else f"{name} (logged)"
        found[label] = Curve(np.array(steps, dtype=np.float64), {name: mean})
    return {
        name: curve
        for name, curve in found.items()
        if any(np.isfinite(line).any() for line in curve.lines.values())
    }


def _by_rank(ranks: Sequence[RankSeries]) -> Curve:
    newest = max((rank.step for rank in ranks), default=0)
    first = max(1, newest - WINDOW + 1)
    steps = np.unique(np.linspace(first, max(first, newest), _RANK_POINTS).astype(np.int64))
    slots = (steps - 1) % WINDOW
    found = np.array([rank.ring[_STEP_AND_MS, slots] for rank in ranks])
    found = found.reshape(len(ranks), 2, len(steps))  # of no rank as well
    table = np.where(found[:, 0] == steps, found[:, 1], np.nan)
    return _told(ranks, steps.astype(np.float64), table, ("slowest", "median", "fastest"))


def _of_gpus(ranks: Sequence[RankSeries], column: int) -> Curve:
    """Return a column of `RankSeries.gpu`; each rank has looked at steps of its own."""
    looked = [np.array(rank.gpu, dtype=np.float64).reshape(-1, 3) for rank in ranks]
    known = [(rank, found) for rank, found in zip(ranks, looked, strict=True) if len(found)]
    steps = np.unique(np.concatenate([found[:, 0] for found in looked]))
    steps = steps[decimate(len(steps), _RANK_POINTS)]
    table = np.array([
        np.interp(steps, found[:, 0], found[:, column], left=np.nan, right=np.nan)
        for _, found in known
    ]).reshape(len(known), len(steps))  # fmt: skip
    return _told([rank for rank, _ in known], steps, table, ("most", "median", "least"))


def _told(
    ranks: Sequence[RankSeries], steps: Floats, table: Floats, names: tuple[str, str, str]
) -> Curve:
    """Return a line for each of a few ranks; of many the most, the median and the least."""
    if len(ranks) <= MAX_LINES:
        lines = {f"rank {rank.rank}": row for rank, row in zip(ranks, table, strict=True)}
        return Curve(steps, lines)
    known = np.isfinite(table).any(axis=0)  # else numpy warns of steps that nobody has
    steps, table = steps[known], table[:, known]
    ends = (np.nanmax(table, axis=0), median_of_known(table.T), np.nanmin(table, axis=0))
    return Curve(steps, dict(zip(names, ends, strict=True)))
