"""Views of runs that never were: what the tests of everything that draws share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dtkit.telemetry import Curve, RankView, RunView

NUM_STEPS = 200


def make_rank(rank: int = 0, **changes: Any) -> RankView:
    view = RankView(
        rank=rank,
        host="node1",
        device=f"cuda:{rank}",
        pid=4000 + rank,
        state="running",
        step=NUM_STEPS,
        step_ms=50.0,
        compute_ms=35.0 + 0.1 * (rank % 4),
        data_ms=1.5,
        comm_ms=13.5,
        samples_per_s=1264.0,
        peak_gib=9.25,
    )
    return dataclasses.replace(view, **changes)


def make_view(num_ranks: int = 4, num_steps: int = NUM_STEPS, **changes: Any) -> RunView:
    """Return a run of `num_steps` steps out of 400 whose loss falls and whose rate is steady."""
    step = np.arange(1.0, num_steps + 1)
    smooth = 0.4 + 2.6 * np.exp(-step / 90)
    wave = 1 + 0.02 * np.sin(step)
    view = RunView(
        name="run-3",
        state="running",
        recipe="--amp bf16",
        elapsed_s=65.2,
        eta_s=70.0,
        step=num_steps,
        total_steps=400,
        loss=float(smooth[-1]),
        best_loss=float(smooth[-1]),
        samples_per_s=5055.0,
        step_ms=50.0,
        data_share=0.03,
        comm_share=0.27,
        sent_bytes=1.05e6,
        raw_bytes=4.2e6,
        peak_gib=9.25,
        lr=3e-4,
        metrics={"accuracy": 0.7132},
        loss_curve=Curve(step, {"raw": smooth * (1 + 0.1 * np.cos(7 * step)), "smoothed": smooth}),
        rate_curve=Curve(
            step, {"all ranks": 5000 * wave, "slowest": 4600 * wave, "fastest": 5300 * wave}
        ),
        ranks=tuple(make_rank(rank) for rank in range(num_ranks)),
        notes=("1 model broadcast",),
        error=None,
    )
    return dataclasses.replace(view, **changes)


def with_loss(view: RunView, raw: Any, smoothed: Any = None) -> RunView:
    """Return the run with another raw loss, and smoothed loss; a step each."""
    smoothed = view.loss_curve.lines["smoothed"] if smoothed is None else smoothed
    step = np.arange(1.0, len(raw) + 1)
    return dataclasses.replace(view, loss_curve=Curve(step, {"raw": raw, "smoothed": smoothed}))


def make_empty_view(num_ranks: int = 4) -> RunView:
    """Return a run before its first step: all that can be unknown is."""
    nan, none = math.nan, np.empty(0)
    numbers = ("loss", "best_loss", "samples_per_s", "step_ms", "data_share", "comm_share",
               "sent_bytes", "raw_bytes")  # fmt: skip
    unknown: dict[str, Any] = dict.fromkeys((*numbers, "eta_s", "peak_gib", "lr"), nan)
    unknown["loss_curve"] = Curve(none, {"raw": none, "smoothed": none})
    unknown["rate_curve"] = Curve(none, {"all ranks": none, "slowest": none, "fastest": none})
    times = dict.fromkeys(("step_ms", "data_ms", "comm_ms", "samples_per_s", "peak_gib"), nan)
    # As RunState has it: a rank without a step says 0 ms of computing.
    rank: dict[str, Any] = {
        "state": "starting",
        "device": "",
        "step": 0,
        "compute_ms": 0.0,
        **times,
    }
    return make_view(
        num_ranks,
        state="starting",
        step=0,
        total_steps=None,
        metrics={},
        notes=(),
        ranks=tuple(make_rank(r, **rank) for r in range(num_ranks)),
        **unknown,
    )


def contrast(first: str, second: str) -> float:
    """Return the ratio of two colours' luminances; source: WCAG 2.2, "contrast ratio"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
