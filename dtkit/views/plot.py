"""One pair of axes of a run's chart: any of its curves, over a background that holds still."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.events import OVER
from dtkit.telemetry import smoothed
from dtkit.views.axis import Limits, labels, log_ticks, step_range, ticks
from dtkit.views.look import COLOURS, DASHES, rows_of
from dtkit.views.words import nonfinite_since

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import ControlChange, RunView
    from dtkit.views.look import Look

    Floats = NDArray[np.float64]

__all__ = ["ALARM", "INK", "Plot"]

ALARM, INK = "#B34700", "#333333"
"""Only for the chart, which is white in every theme."""
_MUTED, _GRID = "#595959", "#E3E3E3"
_NOTES = {
    "loss": "thin: raw · thick: smoothed",
    "samples/s": "all ranks · band: slowest to fastest",
}
_MANY_LINES = 3
"""More are drawn equally thick: the first is not what the others are part of."""
_SHORT = 8
"""Characters of a label of which four stand side by side in the legend; else two."""
_ROW_PX, _LEGEND_ROW_PX = 12, 15
_SPIKE = 3.0
"""What is above so many times nearly all the rest is let out of the axes."""


class Plot:
    """Axes whose lines, marks and message move; title, ticks and grid are laid out rarely."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._shown: tuple[object, ...] = ()
        self._x, self._y = (0.0, 0.0), Limits()
        self._is_log = False
        self._lines: dict[str, Line2D] = {}
        self._band: Any = None  # PolyCollection, where there is one
        self._dot: Line2D | None = None
        self._legend: Any = None
        self._texts: list[Any] = []
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_MUTED)
            axes.spines[side].set_linewidth(0.6)
        axes.grid(visible=True, color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=0, pad=4, labelcolor=_MUTED)
        # Places given once spare matplotlib a search at every layout: a third of its time.
        axes.xaxis.set_label_coords(0.5, 0)
        axes.yaxis.set_label_coords(0, 0.5)
        # Steps after which something was changed by hand: across the height, whatever the scale.
        (self._marks,) = axes.plot(
            [], [], color=_MUTED, lw=1, ls=(0, (4, 2)), transform=axes.get_xaxis_transform(),
            animated=True,
        )  # fmt: skip
        self._message = self._text(0.5, 0.5, "", ha="center", va="center", fontsize=9)

    def update(self, name: str, curve: Curve, view: RunView, look: Look) -> bool:
        """Take what is to be drawn; return whether the background must be drawn again."""
        step, lines = curve.step, dict(curve.lines)
        if look.smoothing and lines:
            values = smoothed(next(iter(lines.values())), look.smoothing)
            lines[f"smoothed {look.smoothing:g}"] = values
        lines = {label: np.where(np.isfinite(v), v, np.nan) for label, v in lines.items()}
        has_positive = any(bool((values > 0).any()) for values in lines.values())
        self._is_log = look.log_scale and name != "samples/s" and has_positive
        if self._is_log:
            lines = {label: np.where(v > 0, v, np.nan) for label, v in lines.items()}
        is_new = self._lay_out(name, lines, look)
        self._draw_lines(name, step, lines)
        self._explain(name, view, lines)
        x = step_range(view.step, view.total_steps, look.part, is_over=view.state in OVER)
        bounds = _bounds(name, step, lines, x if look.part < 1 else None, is_log=self._is_log)
        return self._fit(x, bounds, is_tight=view.state in OVER) or is_new

    def draw(self) -> None:
        """Draw what moves."""
        artists = [self._band, *self._lines.values(), self._dot, self._marks, *self._texts,
                   self._legend, self._message]  # fmt: skip
        for artist in artists:
            if artist is not None:
                self._axes.draw_artist(artist)

    def mark(self, changes: Sequence[ControlChange]) -> None:
        """Mark where something was changed by hand, and what, as far as there is room to say it."""
        seen = [c for c in changes if self._x[0] <= c.step <= self._x[1]]
        steps = [change.step for change in seen]
        self._marks.set_data(np.repeat(steps, 3), np.tile([0.0, 1.0, np.nan], len(steps)))
        while len(self._texts) < len(seen):
            self._texts.append(self._text(0, 0, "", va="top", fontsize=7))
        box, spans = self._axes.bbox, []
        for text, change in zip(self._texts, seen, strict=False):
            at = box.width * (change.step - self._x[0]) / (self._x[1] - self._x[0])
            text.set_text(change.what)
            width = text.get_window_extent().width
            start = at + 4 if at + 4 + width <= box.width else at - 4 - width
            spans.append((start, start + width + 4))
        rows = rows_of(spans)
        px = self._axes.figure.dpi / 100 / box.height
        top = 1 - px * _LEGEND_ROW_PX * self._num_legend_rows()
        for text, (start, _), row in zip(self._texts, spans, rows, strict=False):
            text.set_position((start / box.width, top - px * _ROW_PX * (row or 0)))
            text.set_visible(row is not None)
        for text in self._texts[len(seen) :]:
            text.set_visible(False)

    def _num_legend_rows(self) -> int:
        if self._legend is None:
            return 0
        words = [text.get_text() for text in self._legend.get_texts()]
        return math.ceil(len(words) / _num_columns(words))

    def _text(self, x: float, y: float, text: str, **how: Any) -> Any:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        at = self._axes.transAxes
        return self._axes.text(
            x, y, text, transform=at, color=_MUTED, animated=True, bbox=box, **how
        )

    def _lay_out(self, name: str, lines: dict[str, Floats], look: Look) -> bool:
        """Make the artists of this curve, unless they are there; return whether any was made."""
        shown = (name, *lines, self._is_log, look.part)
        if shown == self._shown:
            return False
        self._shown, self._y, self._x = shown, Limits(), (0.0, 0.0)
        axes = self._axes
        for artist in (*self._lines.values(), self._band, self._dot, self._legend):
            if artist is not None:
                artist.remove()
        self._band = self._dot = self._legend = None
        axes.set_yscale("log" if self._is_log else "linear")
        font = {"fontsize": 9.5, "fontweight": "bold", "color": INK}
        title = f"{name} (log scale)" if self._is_log else name
        axes.set_title(title, loc="left", y=1, pad=7, fontdict=font)
        note = _NOTES.get(name, "")
        axes.set_title(note, loc="right", y=1, pad=7, fontsize=8, color=_MUTED)
        if name == "samples/s":
            self._band = axes.fill_between(
                [], [], [], color=COLOURS[2], alpha=0.25, lw=0, animated=True
            )
        self._lines = {
            label: axes.plot([], [], animated=True, **style)[0]
            for label, style in _styles(name, list(lines)).items()
        }
        if name in _NOTES:
            colour = COLOURS[0 if name == "loss" else 2]
            (self._dot,) = axes.plot([], [], "o", color=colour, ms=5, animated=True, clip_on=False)
        self._make_legend(name)
        return True

    def _make_legend(self, name: str) -> None:
        named = {
            label: line for label, line in self._lines.items()
            if name not in _NOTES or label.startswith("smoothed ")
        }  # fmt: skip
        if named and (name in _NOTES or len(named) > 1):  # else the title says it
            self._legend = self._axes.legend(
                named.values(), named, ncols=_num_columns(list(named)), loc="upper right",
                fontsize=7, handlelength=2.4, columnspacing=1, borderpad=0.1, borderaxespad=0,
                frameon=True, framealpha=0.8, edgecolor="none", labelcolor=INK,
            )  # fmt: skip
            self._legend.set_animated(True)

    def _draw_lines(self, name: str, step: Floats, lines: dict[str, Floats]) -> None:
        for label, line in self._lines.items():
            line.set_data(step, lines[label])
        if self._band is not None:
            low, high = lines["slowest"], lines["fastest"]
            known = np.isfinite(low) & np.isfinite(high)
            x, low, high = step[known], low[known], high[known]
            edge = np.column_stack([np.append(x, x[::-1]), np.append(low, high[::-1])])
            self._band.set_verts([edge] if len(x) else [])
        if self._dot is not None:
            values = lines["smoothed" if name == "loss" else "all ranks"]
            newest = np.flatnonzero(np.isfinite(values))[-1:]
            self._dot.set_data(step[newest], values[newest])

    def _explain(self, name: str, view: RunView, lines: dict[str, Floats]) -> None:
        has_values = any(bool(np.isfinite(values).any()) for values in lines.values())
        since = nonfinite_since(view) if name == "loss" else None
        text = (
            "" if has_values else {"samples/s": "samples not counted"}.get(name, f"no {name} seen")
        )
        if not has_values and not view.step:
            text = "waiting for the first step …" if name == "loss" else ""
        is_alarm = has_values and since is not None
        self._message.set_text(f"✖ not finite since step {since:,}" if is_alarm else text)
        self._message.set_color(ALARM if is_alarm else _MUTED)
        self._message.set_position((0.5, 0.93) if is_alarm else (0.5, 0.5))
        self._message.set_fontweight("bold" if is_alarm else "normal")

    def _fit(
        self, x: tuple[float, float], bounds: tuple[float, float, float] | None, *, is_tight: bool
    ) -> bool:
        """Set the limits; return whether one changed. `bounds`: low, high, and a floor."""
        x_changed, self._x = x != self._x, x
        if x_changed:
            values = ticks(*x, 5, is_integer=True)
            self._axes.set_xlim(*x)
            # "step 0" names the axis without a line of its own.
            self._axes.set_xticks(values, [f"step {labels(values)[0]}", *labels(values)[1:]])
        if bounds is None:
            self._axes.set_yticks([])
            return x_changed
        low, high, floor = bounds
        if self._legend is not None:  # it stands above the lines
            high += 0.09 * (1 + self._num_legend_rows()) * (high - low)
        if not self._y.fit(low, high, floor=floor, is_tight=is_tight):
            return x_changed
        low, high = self._y.low, self._y.high
        values = log_ticks(low, high) if self._is_log else ticks(low, high, 4)
        self._axes.set_ylim(*((10**low, 10**high) if self._is_log else (low, high)))
        self._axes.set_yticks(values, labels(values))
        self._axes.minorticks_off()
        return True


def _num_columns(words: list[str]) -> int:
    return 4 if max(map(len, words)) <= _SHORT else 2


def _styles(name: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return how each line is drawn that is drawn as a line."""
    if name == "loss":
        thin, thick = {"lw": 0.7, "alpha": 0.6}, {"lw": 2}
        found = {"raw": {"color": COLOURS[0], **thin}, "smoothed": {"color": COLOURS[0], **thick}}
    elif name == "samples/s":
        found = {"all ranks": {"color": COLOURS[2], "lw": 2}}
    else:
        found = {}
        for i, label in enumerate(names):
            is_thick = i == 0 or len(names) > _MANY_LINES
            dash = DASHES[i % len(DASHES)]
            width = 1.8 if is_thick else 1.1
            line = (0, [length / width for length in dash]) if dash else "-"
            found[label] = {"color": COLOURS[i % len(COLOURS)], "lw": width, "ls": line}
    found |= {
        label: {"color": COLOURS[1], "lw": 2} for label in names if label.startswith("smoothed ")
    }
    return found


def _bounds(
    name: str, step: Floats, lines: dict[str, Floats], zoom: tuple[float, float] | None,
    *, is_log: bool,
) -> tuple[float, float, float] | None:  # fmt: skip
    """Return what the axis must show, from where to where, and below which it must not go."""
    if zoom is not None:
        inside = (step >= zoom[0]) & (step <= zoom[1])
        lines = {label: values[inside] for label, values in lines.items()}
    known = {label: values[np.isfinite(values)] for label, values in lines.items()}
    if not any(map(len, known.values())):
        return None
    if name == "loss":  # a single raw spike must not flatten the curve
        raw, rest = known["raw"], np.concatenate([v for k, v in known.items() if k != "raw"])
        values = np.append(np.percentile(raw, [1, 99]) if len(raw) else [], rest)
        low, high = float(values.min()), float(values.max())
    elif name == "samples/s":
        # The band may leave the axes for an instant: what counts is where it stays.
        top = [float(np.percentile(known["fastest"], 98))] if len(known["fastest"]) else []
        high = max([*top, *(float(v.max()) for k, v in known.items() if len(v) and k != "fastest")])
        return 0.0, high, 0.0
    else:
        values = np.concatenate(list(known.values()))
        low, high, most = float(values.min()), float(values.max()), float(np.percentile(values, 98))
        if high > _SPIKE * most > 0 and not is_log:
            high = 1.3 * most
        if low >= 0 and zoom is None and not is_log:
            low = 0.0  # compared with zero, but when zoomed
    if is_log:
        return math.log10(low), math.log10(high), -math.inf
    return low, high, 0.0 if low >= 0 else -math.inf
