"""What tuning found, as a table and a picture."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit._format import format_rate, format_size
from dtkit.views.runstable import html_table, text_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.driver.trials.tune import BatchTuning, LrTuning

__all__ = ["batch_bundle", "batch_text", "lr_bundle"]

_BLUE, _VERMILION = "#0072B2", "#D55E00"
_HEAD = ("batch_size", "state", "samples/s", "peak memory")


def batch_bundle(tuning: BatchTuning) -> dict[str, str]:
    """Return the search of a batch as text/html, image/png and text/plain."""
    known = [t for t in tuning.trials if t.samples_per_s > 0]

    def draw(axes: Any) -> None:
        axes.plot(
            [t.batch_size for t in known], [t.samples_per_s for t in known], "o-", color=_BLUE
        )
        if tuning.knee is not None:
            axes.axvline(tuning.knee, color=_VERMILION, ls="--", lw=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch_size", fontsize=8)
        axes.set_title("samples/s", loc="left", fontsize=9.5, fontweight="bold")

    alt = "Samples/s over batch size. " + tuning.proposal()
    html = html_table(_HEAD, _rows(tuning)) + "".join(_lines(tuning.notes))
    return _bundle(tuning.proposal(), html, batch_text(tuning), alt, draw if known else None)


def batch_text(tuning: BatchTuning) -> str:
    """Return it as plain text."""
    return "\n".join([tuning.proposal(), text_table(_HEAD, _rows(tuning)), *tuning.notes])


def lr_bundle(tuning: LrTuning) -> dict[str, str]:
    """Return a range test as text/html, image/png and text/plain."""

    def draw(axes: Any) -> None:
        axes.plot(tuning.lr, tuning.loss, color=_BLUE)
        if not math.isnan(tuning.steepest):
            axes.axvline(tuning.steepest, color=_VERMILION, ls="--", lw=1)
        axes.set_xscale("log")
        # The loss that is lost must not flatten what was to be seen.
        finite = tuning.loss[np.isfinite(tuning.loss)]
        if len(finite):
            low, start = float(finite.min()), float(finite[0])
            axes.set_ylim(low - 0.1 * abs(start - low), start + 0.5 * abs(start - low) + 1e-12)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_title("loss", loc="left", fontsize=9.5, fontweight="bold")

    alt = "Loss over the learning rate. " + tuning.proposal()
    return _bundle(
        tuning.proposal(), "".join(_lines(tuning.notes)), repr(tuning), alt,
        draw if len(tuning.lr) else None,
    )  # fmt: skip


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


def _rows(tuning: BatchTuning) -> list[tuple[str, ...]]:
    return [
        (
            f"{t.batch_size:,}",
            t.state if t.state != "failed" else f"failed: {t.error.splitlines()[0][:90]}",
            "–" if math.isnan(t.samples_per_s) else format_rate(t.samples_per_s),
            "–" if math.isnan(t.peak_gib) else format_size(t.peak_gib),
        )
        for t in tuning.trials
    ]


def _lines(notes: list[str]) -> list[str]:
    return [f"<div>{escape(note)}</div>" for note in notes]
