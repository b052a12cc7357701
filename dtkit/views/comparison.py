"""Runs side by side: in what they differ as a table, their curves in one picture."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit._format import format_loss, format_rate, format_time
from dtkit.views.look import RUN_COLOURS, RUN_STYLES
from dtkit.views.runstable import html_table, text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dtkit.telemetry import History
    from dtkit.values import RunFacts

    Floats = NDArray[np.float64]

__all__ = ["Comparison", "mean_rate"]

_SMOOTHING_STEPS = 20
"""Most steps over which a drawn curve is averaged; never more than a twentieth of it."""


class Comparison:
    """Some runs, compared; a notebook shows it as a picture and a table.

    Attributes:
        names: the runs.
        differences: for each setting in which they differ, its value in every run.
        results: what came of each: steps, loss, samples/s and time.
    """

    def __init__(self, runs: Sequence[tuple[RunFacts, History]]) -> None:
        self._runs = tuple(runs)
        self.names: tuple[str, ...] = tuple(facts.name for facts, _ in runs)
        self.differences: dict[str, tuple[Any, ...]] = _differences([facts for facts, _ in runs])
        self.results: dict[str, dict[str, str]] = {
            facts.name: _results(facts, history) for facts, history in runs
        }

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [(name, *map(_shown, values)) for name, values in self.differences.items()]
        keys = next(iter(self.results.values()), {})
        rows += [(key, *(self.results[name][key] for name in self.names)) for key in keys]
        return rows

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        png = base64.b64encode(draw(self._runs)).decode()
        alt = f"Loss over steps and over seconds of the runs {', '.join(self.names)}"
        picture = f'<img src="data:image/png;base64,{png}" alt="{alt}" width="740">'
        return {
            "text/plain": repr(self),
            "text/html": f"<div>{picture}</div>{html_table(('', *self.names), self._rows())}",
            "image/png": png,
        }

    def __repr__(self) -> str:
        return text_table(("", *self.names), self._rows())


def draw(runs: Sequence[tuple[RunFacts, History]]) -> bytes:
    """Return the runs' losses over steps and over time as PNG."""
    from matplotlib import style  # half a second: only when drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(7.4, 2.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, column, label in zip(
            figure.subplots(1, 2, sharey=True), ("step", "time_s"), ("step", "seconds"), strict=True
        ):
            for i, (facts, history) in enumerate(runs):
                seen = np.isfinite(history["loss"])
                axes.plot(
                    history[column][seen], smoothed(history["loss"][seen]), lw=1.5,
                    color=RUN_COLOURS[i % len(RUN_COLOURS)], ls=RUN_STYLES[i % len(RUN_STYLES)],
                    label=facts.name,
                )  # fmt: skip
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(visible=True, color="#E3E3E3", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_title("loss", loc="left", fontsize=9.5, fontweight="bold")
        figure.axes[0].legend(fontsize=8, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def smoothed(values: Floats) -> Floats:
    """Return the mean of each value and those before it, over a short window."""
    window = max(1, min(_SMOOTHING_STEPS, len(values) // 20))
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    low = np.maximum(0, np.arange(1, len(values) + 1) - window)
    return np.asarray((sums[1:] - sums[low]) / (np.arange(1, len(values) + 1) - low))


def _differences(all_facts: Sequence[RunFacts]) -> dict[str, tuple[Any, ...]]:
    """Return each setting that is not the same in all runs."""
    settings = [
        {**f.recipe, **f.options, "ranks": len(f.ranks), **f.environment} for f in all_facts
    ]
    names = dict.fromkeys(name for values in settings for name in values)
    rows = {name: tuple(values.get(name) for values in settings) for name in names}
    return {name: row for name, row in rows.items() if any(v != row[0] for v in row)}


def mean_rate(history: History) -> float:
    """Return samples per second over a whole run; NaN if samples were not counted.

    Samples over time: a mean of the steps' rates would favour the fast steps.
    """
    steps, rates = history["step_ms"], history["samples_per_s"]
    seen = np.isfinite(rates) & np.isfinite(steps) & (steps > 0)
    return (
        float(np.sum(rates[seen] * steps[seen]) / np.sum(steps[seen])) if seen.any() else math.nan
    )


def _results(facts: RunFacts, history: History) -> dict[str, str]:
    rate = mean_rate(history)
    return {
        "state": facts.state,
        "steps": f"{history.num_steps:,}",
        "last loss": "–" if facts.loss is None else format_loss(facts.loss),
        "samples/s": "–" if math.isnan(rate) else format_rate(rate),
        "took": format_time(facts.elapsed_s),
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)
