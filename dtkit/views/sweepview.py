"""A sweep as a table and a picture."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from dtkit._format import UNKNOWN, format_bytes, format_loss, format_rate, format_size, format_time
from dtkit.views.look import RUN_COLOURS, RUN_STYLES
from dtkit.views.runstable import html_table, text_table
from dtkit.views.sweeptable import samples_and_seconds, smoothed_loss
from dtkit.views.words import GLYPHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.telemetry import History
    from dtkit.views.sweeptable import Outcome

__all__ = ["sweep_bundle", "sweep_text"]

_MAX_ERROR_CHARS = 90
_DRAWN = 0.05
"""Of a run's samples, that its drawn loss is averaged over."""

Curves = "Sequence[tuple[str, History]]"


def sweep_bundle(
    name: str, outcomes: Sequence[Outcome], curves: Sequence[tuple[str, History]],
    notes: Sequence[str],
) -> dict[str, str]:  # fmt: skip
    """Return a sweep as text/html, image/png and text/plain."""
    head, rows = _table(outcomes)
    said = "".join(f"<div>{escape(note)}</div>" for note in notes)
    html = f"<div><b>{escape(name)}</b></div>{html_table(head, rows)}{said}"
    bundle = {"text/plain": sweep_text(name, outcomes, notes)}
    shown = [(label, history) for label, history in curves if history.num_steps]
    if shown:
        png = base64.b64encode(draw(shown)).decode()
        alt = f"Loss over samples and over seconds under {len(shown)} recipes of sweep {name}"
        html = f'<img src="data:image/png;base64,{png}" alt="{escape(alt)}" width="740">{html}'
        bundle["image/png"] = png
    return {"text/html": f"<div>{html}</div>", **bundle}


def sweep_text(name: str, outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """Return a sweep as plain text."""
    return "\n".join([name, text_table(*_table(outcomes)), *notes])


def draw(curves: Sequence[tuple[str, History]]) -> bytes:
    """Return the losses over samples and over seconds as PNG."""
    from matplotlib import style  # half a second: only when drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        height = 2.6 + 0.18 * math.ceil(len(curves) / 3)
        figure = Figure(figsize=(7.4, height), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for i, (label, history) in enumerate(curves):
            loss = smoothed_loss(history, _DRAWN * samples_and_seconds(history)[0][-1])
            known = np.isfinite(loss)
            for axes, values in zip(panels, samples_and_seconds(history), strict=True):
                axes.plot(
                    values[known], loss[known], lw=1.5, color=RUN_COLOURS[i % len(RUN_COLOURS)],
                    ls=RUN_STYLES[i // len(RUN_COLOURS) % len(RUN_STYLES)], label=label,
                )  # fmt: skip
        for axes, label in zip(panels, ("samples", "seconds"), strict=True):
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(visible=True, color="#E3E3E3", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_title("loss", loc="left", fontsize=9.5, fontweight="bold")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False
        )
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _table(outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    samples = next((o.equal_samples for o in outcomes if not math.isnan(o.equal_samples)), math.nan)
    seconds = next((o.equal_s for o in outcomes if not math.isnan(o.equal_s)), math.nan)
    at_samples = UNKNOWN if math.isnan(samples) else f"{samples:,.0f}"
    at_time = UNKNOWN if math.isnan(seconds) else f"{seconds:.3g}"
    head = (
        "recipe", "state", f"loss at {at_samples} samples", f"loss at {at_time} s", "samples/s",
        "sent/step", "peak memory", "steps", "took",
    )  # fmt: skip
    return head, [_row(outcome) for outcome in outcomes]


def _row(o: Outcome) -> tuple[str, ...]:
    state = f"{GLYPHS.get(o.state, '○')} {o.state}"
    if o.error:
        first = o.error.splitlines()[0]
        state += f": {first[:_MAX_ERROR_CHARS]}{'…' if len(first) > _MAX_ERROR_CHARS else ''}"
    if not o.num_steps:
        return (o.label, state, *[UNKNOWN] * 7)
    return (
        o.label,
        state,
        *(UNKNOWN if math.isnan(v) else format_loss(v)
          for v in (o.loss_at_samples, o.loss_at_time)),
        format_rate(o.samples_per_s),
        UNKNOWN if math.isnan(o.sent_bytes) else format_bytes(o.sent_bytes),
        format_size(o.peak_gib),
        f"{o.num_steps:,}",
        format_time(o.train_s),
    )  # fmt: skip
