"""Two of a run's curves as one PNG: loss, and samples/s with the band over the ranks, at first.

matplotlib's object API only: pyplot keeps figures alive, and picks a backend
for the user's own plots. This module is imported when a chart is first drawn,
never by `import dtkit`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dtkit.views.look import COLOURS, FIRST, Look, curves_in
from dtkit.views.plot import ALARM, INK, Plot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

__all__ = ["HEIGHT_PX", "WIDTH_PX", "Chart"]

WIDTH_PX, HEIGHT_PX = 740, 240
"""Size on the page; a chart of 200 dpi has twice the pixels in the same place."""

_DPI = 100


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
        self._plots = (Plot(left), Plot(right))
        few, self._all_colours = (COLOURS[0], COLOURS[2]), _palette((*COLOURS, ALARM, INK))
        self._few_colours = _palette((*few, ALARM, INK))
        self._is_large = dpi > _DPI
        self._background: object | None = None
        self.num_layouts: int = 0
        """How often the axes were laid out anew."""

    @style.context("default")
    def render(
        self,
        view: RunView,
        look: Look = Look(),  # noqa: B008  immutable
        curves: Mapping[str, Curve] | None = None,
    ) -> bytes:
        """Return the chart of `view` as PNG: white, opaque, at most about 40 kB.

        Args:
            view: the run.
            look: what is drawn of it, and how; what there is no curve of is not.
            curves: all that can be drawn; None: what is in the view.
        """
        known = {**curves_in(view), **(curves or {})}
        names = look.drawn(known)
        changed = [
            plot.update(name, known[name], view, look)
            for plot, name in zip(self._plots, names, strict=True)
        ]
        for plot in self._plots:
            plot.mark(view.changes)
        if any(changed) or self._background is None:
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self._figure.bbox)
            self.num_layouts += 1
        else:
            self._canvas.restore_region(self._background)
        for plot in self._plots:
            plot.draw()
        is_usual = names == FIRST and not look.smoothing
        return self._encode(self._few_colours if is_usual else self._all_colours)

    def _encode(self, palette: Image.Image) -> bytes:
        # A palette of the chart's own colours makes the PNG a third as large, in half the time.
        pixels = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        indexed = pixels.quantize(palette=palette, dither=Image.Dither.NONE)
        file = io.BytesIO()
        indexed.save(file, format="png", optimize=self._is_large)
        return file.getvalue()


def _palette(inks: Sequence[str]) -> Image.Image:
    """Return each ink in shades down to white."""
    shades = np.linspace(0, 1, 12)[:, None]
    parts = [[int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in inks]
    ramps = [(255 - shades * (255 - np.array(ink))).round().astype(int) for ink in parts]
    image = Image.new("P", (1, 1))
    image.putpalette(np.concatenate(ramps).ravel().tolist())
    return image
