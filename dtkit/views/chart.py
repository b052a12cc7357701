"""The run's two curves as one PNG: loss, and samples/s with the band over the ranks.

matplotlib's object API only: pyplot keeps figures alive, and picks a backend
for the user's own plots. This module is imported when a chart is first drawn,
never by `import dtkit`.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dtkit._text import OVER, nonfinite_since
from dtkit.views.axis import Limits, labels, log_ticks, step_end, ticks
from dtkit.views.render import BLUE, GREEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from dtkit.telemetry.view import ControlChange, RunView

    Floats = NDArray[np.float64]

__all__ = ["HEIGHT_PX", "WIDTH_PX", "Chart"]

WIDTH_PX, HEIGHT_PX = 740, 240
"""Size on the page; a chart of 200 dpi has twice the pixels in the same place."""

_DPI = 100
_ALARM, _INK, _MUTED, _GRID = "#B34700", "#333333", "#595959", "#E3E3E3"
"""Only for the chart, which is white in every theme."""


class Chart:
    """A figure that is drawn again and again, into the same artists.

    Most frames only draw the lines over a kept background, which takes a
    seventh of the time; axes and ticks are laid out anew when a limit changes.

    Args:
        dpi: 100 for the size on the page, 200 for twice the pixels.
    """

    @style.context("default")  # not the user's own style, which may be white on black
    def __init__(self, dpi: int = _DPI) -> None:
        self._figure = Figure(
            figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=dpi, facecolor="white"
        )
        self._canvas = FigureCanvasAgg(self._figure)
        left, right = self._figure.subplots(1, 2)
        self._figure.subplots_adjust(left=0.065, right=0.975, bottom=0.12, top=0.88, wspace=0.19)
        self._panels = (_LossPanel(left), _RatePanel(right))
        self._palette = _palette()
        self._is_large = dpi > _DPI
        self._background: object | None = None
        self.num_layouts: int = 0
        """How often the axes were laid out anew."""

    @style.context("default")
    def render(self, view: RunView, *, log_scale: bool = False) -> bytes:
        """Return the chart of `view` as PNG: white, opaque, at most about 40 kB."""
        changed = [panel.update(view, log_scale=log_scale) for panel in self._panels]
        for panel in self._panels:
            panel.mark(view.changes)
        if any(changed) or self._background is None:
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self._figure.bbox)
            self.num_layouts += 1
        else:
            self._canvas.restore_region(self._background)
        for panel in self._panels:
            panel.draw()
        return self._encode()

    def _encode(self) -> bytes:
        # A palette of the chart's own colours makes the PNG a third as large, in half the time.
        pixels = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        indexed = pixels.quantize(palette=self._palette, dither=Image.Dither.NONE)
        file = io.BytesIO()
        indexed.save(file, format="png", optimize=self._is_large)
        return file.getvalue()


class _Panel:
    """Axes whose moving artists are drawn over a background that holds still."""

    def __init__(self, axes: Axes, title: str, legend: str) -> None:
        self._axes = axes
        self._x_end = 0.0
        self._y = Limits()
        self._is_log = False
        self._moving: list[Artist] = []
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_MUTED)
            axes.spines[side].set_linewidth(0.6)
        axes.grid(visible=True, color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=0, pad=4, labelcolor=_MUTED)
        self._set_title(title)
        axes.set_title(legend, loc="right", y=1, pad=7, fontsize=8, color=_MUTED)
        # Places given once spare matplotlib a search at every layout: a third of its time.
        axes.xaxis.set_label_coords(0.5, 0)
        axes.yaxis.set_label_coords(0, 0.5)
        # Steps after which something was changed by hand: across the height, whatever the scale.
        (self._marks,) = axes.plot(
            [], [], color=_MUTED, lw=1, ls=(0, (4, 2)), transform=axes.get_xaxis_transform(),
            animated=True,
        )  # fmt: skip
        self._message = axes.text(
            0.5, 0.5, "", transform=axes.transAxes, ha="center", va="center", fontsize=9,
            color=_MUTED, animated=True,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )  # fmt: skip

    def update(self, view: RunView, *, log_scale: bool) -> bool:
        """Take the view's numbers; return whether the background must be drawn again."""
        raise NotImplementedError

    def draw(self) -> None:
        for artist in (*self._moving, self._marks, self._message):
            self._axes.draw_artist(artist)

    def mark(self, changes: Sequence[ControlChange]) -> None:
        """Mark where something was changed by hand; what, the notes say."""
        steps = [change.step for change in changes]
        self._marks.set_data(np.repeat(steps, 3), np.tile([0.0, 1.0, np.nan], len(steps)))

    def _set_title(self, title: str) -> None:
        font = {"fontsize": 9.5, "fontweight": "bold", "color": _INK}
        self._axes.set_title(title, loc="left", y=1, pad=7, fontdict=font)

    def _say(self, text: str, *, is_alarm: bool = False) -> None:
        self._message.set_text(text)
        self._message.set_color(_ALARM if is_alarm else _MUTED)
        self._message.set_position((0.5, 0.93) if is_alarm else (0.5, 0.5))
        self._message.set_fontweight("bold" if is_alarm else "normal")

    def _fit(self, view: RunView, bounds: tuple[float, float] | None, floor: float) -> bool:
        """Set the limits; `bounds` is None while there is nothing to show."""
        is_over = view.state in OVER
        x_end = step_end(view.step, view.total_steps, is_over=is_over)
        x_changed, self._x_end = x_end != self._x_end, x_end
        if x_changed:
            self._layout_x()
        if bounds is None:
            self._axes.set_yticks([])
            return x_changed
        y_changed = self._y.fit(*bounds, floor=floor, is_tight=is_over)
        if y_changed:
            self._layout_y()
        return x_changed or y_changed

    def _layout_x(self) -> None:
        values = ticks(0, self._x_end, 5, is_integer=True)
        self._axes.set_xlim(0, self._x_end)
        # "step 0" names the axis without a line of its own.
        self._axes.set_xticks(values, ["step 0", *labels(values)[1:]])

    def _layout_y(self) -> None:
        low, high = self._y.low, self._y.high
        values = log_ticks(low, high) if self._is_log else ticks(low, high, 4)
        self._axes.set_ylim(*((10**low, 10**high) if self._is_log else (low, high)))
        self._axes.set_yticks(values, labels(values))
        self._axes.minorticks_off()


class _LossPanel(_Panel):
    """Raw loss thin, smoothed loss thick, a dot at the newest point."""

    def __init__(self, axes: Axes) -> None:
        super().__init__(axes, "loss", "thin: raw · thick: smoothed")
        (self._raw,) = axes.plot([], [], color=BLUE, lw=0.7, alpha=0.6, animated=True)
        (self._smooth,) = axes.plot([], [], color=BLUE, lw=2, animated=True)
        (self._dot,) = axes.plot([], [], "o", color=BLUE, ms=5, animated=True, clip_on=False)
        self._moving = [self._raw, self._smooth, self._dot]

    def update(self, view: RunView, *, log_scale: bool) -> bool:
        step, raw, smooth = view.loss_step, view.loss_raw, view.loss_smooth
        values = np.concatenate([raw, smooth])
        values = values[np.isfinite(values)]
        is_log = log_scale and bool((values > 0).any())
        self._raw.set_data(step, _drawable(raw, is_log=is_log))
        self._smooth.set_data(step, _drawable(smooth, is_log=is_log))
        newest = np.flatnonzero(np.isfinite(smooth))[-1:]
        self._dot.set_data(step[newest], smooth[newest])
        self._explain(view, has_values=bool(len(values)))
        is_new_scale = is_log != self._is_log
        if is_new_scale:
            self._is_log, self._y = is_log, Limits()
            self._axes.set_yscale("log" if is_log else "linear")
            self._set_title("loss (log scale)" if is_log else "loss")
        return self._fit(view, *self._bounds(raw, smooth)) or is_new_scale

    def _explain(self, view: RunView, *, has_values: bool) -> None:
        since = nonfinite_since(view)
        if not has_values:
            self._say("no loss seen" if view.step else "waiting for the first step …")
        elif since is not None:
            self._say(f"✖ not finite since step {since:,}", is_alarm=True)
        else:
            self._say("")

    def _bounds(self, raw: Floats, smooth: Floats) -> tuple[tuple[float, float] | None, float]:
        """Return what the axis must show, and what it must not go below."""
        raw, smooth = (_drawable(v, is_log=self._is_log) for v in (raw, smooth))
        raw, smooth = raw[np.isfinite(raw)], smooth[np.isfinite(smooth)]
        if not len(raw) + len(smooth):
            return None, 0.0
        # A single raw spike must not flatten the curve: the raw line may leave the axes.
        ends = np.percentile(raw, [1, 99]) if len(raw) else smooth[:1]
        low, high = (float(f(np.concatenate([ends, smooth]))) for f in (np.min, np.max))
        if self._is_log:
            return (math.log10(low), math.log10(high)), -math.inf
        return (low, high), 0.0 if low >= 0 else -math.inf


class _RatePanel(_Panel):
    """Samples/s over all ranks; the band runs from the slowest rank to the fastest."""

    def __init__(self, axes: Axes) -> None:
        super().__init__(axes, "samples/s", "all ranks · band: slowest to fastest")
        self._band = axes.fill_between([], [], [], color=GREEN, alpha=0.25, lw=0, animated=True)
        (self._rate,) = axes.plot([], [], color=GREEN, lw=2, animated=True)
        (self._dot,) = axes.plot([], [], "o", color=GREEN, ms=5, animated=True, clip_on=False)
        self._moving = [self._band, self._rate, self._dot]

    def update(self, view: RunView, *, log_scale: bool) -> bool:
        del log_scale  # a rate is compared with zero
        known = np.isfinite(view.rate) & np.isfinite(view.rate_low) & np.isfinite(view.rate_high)
        step, rate = view.rate_step[known], view.rate[known]
        low, high = view.rate_low[known], view.rate_high[known]
        x, y = np.concatenate([step, step[::-1]]), np.concatenate([low, high[::-1]])
        self._band.set_verts([np.column_stack([x, y])] if len(step) else [])
        self._rate.set_data(step, rate)
        self._dot.set_data(step[-1:], rate[-1:])
        if len(rate):
            self._say("")
            # The band may leave the axes for an instant: what counts is where it stays.
            top = max(float(np.percentile(high, 98)), float(rate.max()))
            return self._fit(view, (0.0, top), 0.0)
        self._say("samples not counted" if view.step else "")
        return self._fit(view, None, 0.0)


def _drawable(values: Floats, *, is_log: bool) -> Floats:
    if not is_log:
        return np.where(np.isfinite(values), values, np.nan)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _palette() -> Image.Image:
    """Return the colours that occur: each ink, in shades down to white."""
    shades = np.linspace(0, 1, 12)[:, None]
    inks = [[int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in (BLUE, GREEN, _ALARM, _INK)]
    ramps = [(255 - shades * (255 - np.array(ink))).round().astype(int) for ink in inks]
    image = Image.new("P", (1, 1))
    image.putpalette(np.concatenate(ramps).ravel().tolist())
    return image
