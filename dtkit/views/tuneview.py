"""What tuning found, as a table and a picture."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit._format import format_rate, format_size
from dtkit.views.look import BLUE, VERMILION
from dtkit.views.runstable import html_table, text_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["BatchTrial", "batch_bundle", "batch_text", "lr_bundle"]

_HEAD = ("batch_size", "state", "samples/s", "peak memory")


@dataclass(frozen=True, slots=True)
class BatchTrial:
    """One batch size that was tried.

    Attributes:
        batch_size: as a DataLoader's `batch_size`.
        state: fits, out of memory, more than the data, or failed.
        samples_per_s: over all ranks; NaN if it did not run.
        peak_gib: the largest of the ranks'.
        error: what it failed with.
        num_timed: steps that `samples_per_s` is the median of; 0: it is of one that warmed up.
    """

    batch_size: int
    state: str
    samples_per_s: float = math.nan
    peak_gib: float = math.nan
    error: str = ""
    num_timed: int = 0

    @property
    def is_timed(self) -> bool:
        """Whether it is known how fast it is."""
        return self.samples_per_s > 0


def batch_bundle(
    trials: Sequence[BatchTrial], knee: int | None, proposal: str, notes: Sequence[str]
) -> dict[str, str]:
    """Return the search of a batch as text/html, image/png and text/plain.

    Args:
        trials: in order of size.
        knee: the smallest batch that is nearly as fast as the fastest, if one was found.
        proposal: what to write, in one line.
        notes: what the user should know.
    """
    known = [t for t in trials if t.is_timed]

    def draw(axes: Any) -> None:
        axes.plot([t.batch_size for t in known], [t.samples_per_s for t in known], "o-", color=BLUE)
        if knee is not None:
            axes.axvline(knee, color=VERMILION, ls="--", lw=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch_size", fontsize=8)
        axes.set_title("samples/s", loc="left", fontsize=9.5, fontweight="bold")

    alt = "Samples/s over batch size. " + proposal
    html = html_table(_HEAD, _rows(trials)) + _lines(notes)
    text = batch_text(trials, proposal, notes)
    return _bundle(proposal, html, text, alt, draw if known else None)


def batch_text(trials: Sequence[BatchTrial], proposal: str, notes: Sequence[str]) -> str:
    """Return it as plain text."""
    return "\n".join([proposal, text_table(_HEAD, _rows(trials)), *notes])


def lr_bundle(
    lr: Floats, loss: Floats, steepest: float, proposal: str, notes: Sequence[str]
) -> dict[str, str]:
    """Return a range test as text/html, image/png and text/plain.

    Args:
        lr: (num_steps,) float64.
        loss: (num_steps,) float64, smoothed.
        steepest: the learning rate at which the loss falls fastest; NaN: it never does.
        proposal: what to write, in one line.
        notes: what the user should know.
    """

    def draw(axes: Any) -> None:
        axes.plot(lr, loss, color=BLUE)
        if not math.isnan(steepest):
            axes.axvline(steepest, color=VERMILION, ls="--", lw=1)
        axes.set_xscale("log")
        # The loss that is lost must not flatten what was to be seen.
        finite = loss[np.isfinite(loss)]
        if len(finite):
            low, start = float(finite.min()), float(finite[0])
            axes.set_ylim(low - 0.1 * abs(start - low), start + 0.5 * abs(start - low) + 1e-12)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_title("loss", loc="left", fontsize=9.5, fontweight="bold")

    alt = "Loss over the learning rate. " + proposal
    text = "\n".join([proposal, *notes])
    return _bundle(proposal, _lines(notes), text, alt, draw if len(lr) else None)


def _bundle(
    proposal: str, html: str, text: str, alt: str, draw: Callable[[Any], None] | None
) -> dict[str, str]:
    picture, bundle = "", {"text/plain": text}
    if draw is not None:
        png = bundle["image/png"] = base64.b64encode(_png(draw)).decode()
        picture = f'<img src="data:image/png;base64,{png}" alt="{escape(alt)}" width="420">'
    bundle["text/html"] = f"<div><b>{escape(proposal)}</b><div>{picture}</div>{html}</div>"
    return bundle


def _png(draw: Callable[[Any], None]) -> bytes:
    from matplotlib import style  # half a second: only when drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(4.2, 2.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, color="#E3E3E3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _rows(trials: Sequence[BatchTrial]) -> list[tuple[str, ...]]:
    return [
        (
            f"{t.batch_size:,}",
            t.state if t.state != "failed" else f"failed: {t.error.splitlines()[0][:90]}",
            "–" if math.isnan(t.samples_per_s) else format_rate(t.samples_per_s),
            "–" if math.isnan(t.peak_gib) else format_size(t.peak_gib),
        )
        for t in trials
    ]


def _lines(notes: Sequence[str]) -> str:
    return "".join(f"<div>{escape(note)}</div>" for note in notes)
