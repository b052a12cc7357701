"""A timeline that is zoomed and moved in the browser; needs `dtkit[live]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.errors import InvalidInputError
from dtkit.trace.rows import names_of
from dtkit.views.gantt import COLOURS, FLYING, alt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.trace.rows import RankTrace

__all__ = ["spans", "zoomable"]

_OPENING_STEPS = 4


def zoomable(traces: Sequence[RankTrace]) -> Any:  # Any: anywidget is there or not
    """Return a widget with all steps of a timeline, opened on the last few.

    Raises:
        InvalidInputError: anywidget is not installed.
    """
    try:
        from anywidget import AnyWidget
        from traitlets import Bytes, List, Unicode
    except ImportError:
        msg = "--zoom needs the package anywidget: pip install 'dtkit[live]'"
        raise InvalidInputError(msg) from None

    class Gantt(AnyWidget):
        _esm = Path(__file__).with_name("gantt.js")
        ranks: Any = List().tag(sync=True)
        kinds: Any = List().tag(sync=True)
        spans = Bytes().tag(sync=True)
        opening: Any = List().tag(sync=True)
        alt = Unicode().tag(sync=True)

    found = spans(traces)
    end_ms = float(found[:, 3].max(initial=0.01))
    newest = float(found[:, 4].max(initial=0)) - _OPENING_STEPS
    start_ms = float(found[found[:, 4] > newest, 2].min(initial=end_ms))
    return Gantt(
        ranks=list(names_of(traces).values()),
        kinds=[
            *([name, colour, False] for name, colour in COLOURS.items()),
            ["collective under way", FLYING, True],
        ],
        spans=found.tobytes(),
        opening=[start_ms if start_ms < end_ms else 0.0, end_ms],
        alt=alt_text(traces),
    )


def spans(traces: Sequence[RankTrace]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return all spans: (num_spans, 5) float64.

    Columns are the rank's row, the kind (a phase, or after the last of them a collective
    under way), start and end in milliseconds since the first step began, and the step.
    """
    zero_ns = min((t.steps[0].start_ns for t in traces if t.steps), default=0)
    rows = [
        (row, kind, (start_ns - zero_ns) / 1e6, (end_ns - zero_ns) / 1e6, step.number)
        for row, trace in enumerate(traces)
        for step in trace.steps
        for kind, start_ns, end_ns in (
            *((s.phase, s.start_ns, s.end_ns) for s in step.spans),
            *((len(COLOURS), c.call_ns, c.done_ns) for c in step.collectives if c.done_ns),
        )
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)
