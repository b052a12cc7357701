"""What a run says at its end about its own settings; it stays silent where it does not know."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit._format import format_bytes, format_ms, format_percent
from dtkit.batchsize import BatchPlacement, place_batch
from dtkit.compression import GATHERED, Compression

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.driver.runs.run import Run

__all__ = ["METHODS", "advise", "placement_of", "worth_it"]

METHODS = {"fp16": 2.0, "int8": 4.0}
"""Methods that are proposed, with how many times less two ranks send with them: those that train
as well as uncompressed gradients without a setting of their own."""
_ACCUMULATE = 4
_LEAST_MEASURED = 24
"""Estimates of the noise scale that must be there: the first ones are of few steps."""
_LEAST_STEPS = 20
_LEAST_SHARE = 0.1
"""Of a step, that communication must take before anything is measured."""
_LEAST_GAIN = 1.1
_LEAST_EXPLAINED = 0.5
"""Of the communication, that bytes over bandwidth must account for: else it is not the bytes."""


def advise(run: Run, probe: Callable[[], dict[str, Any]]) -> None:
    """Add to a run's notes what it shows about its settings.

    Args:
        run: it has ended.
        probe: measures the link and compression, as `dtkit.engine.probe` does; asked only if a
            gain is possible.
    """
    if run.state == "failed" or run.recipe.strategy != "ddp":
        return
    placed = placement_of(run)
    if placed is not None:
        run.note(str(placed))
    if (text := gathers_too_much(run)) is not None:
        run.note(text)
    if _link_ms(run) >= _LEAST_SHARE * run.view().step_ms:
        text = worth_it(run, probe())
        if text is not None:
            run.note(text)


def placement_of(run: Run) -> BatchPlacement | None:
    """Return where the run's batch stands against its gradient noise scale; None: not known."""
    history = run.history
    if "noise_scale" not in history:
        return None
    scale = history["noise_scale"]
    known = scale[np.isfinite(scale)]
    samples = history["samples_per_s"] * history["step_ms"] / 1000.0
    if len(known) < _LEAST_MEASURED or not np.isfinite(samples).any():
        return None
    return place_batch(
        float(np.median(known[len(known) // 2 :])),
        round(float(np.nanmedian(samples))),
        lr=float(np.nanmax(history["lr"])),  # as it is written: schedules lower it from there
        optimizer=next((s["optimizer"] for s in run.summaries if "optimizer" in s), ""),
    )


def gathers_too_much(run: Run) -> str | None:
    """Return that a method saves too little with so many ranks; None: it saves enough."""
    view, method = run.view(), Compression.parse(run.recipe.compress)
    if method.name not in GATHERED or not 2 * view.sent_bytes >= view.raw_bytes:
        return None
    return (
        f"--compress {method} sent {format_bytes(view.sent_bytes)} a step, where uncompressed "
        f"gradients take {format_bytes(view.raw_bytes)}: each rank sends its part to each of the "
        f"{len(view.ranks) - 1} others, so the more ranks, the less is saved. fp16, bf16 and "
        "powersgd are added up on the way and save the same with any number"
    )


def worth_it(run: Run, link: dict[str, Any]) -> str | None:
    """Return what compression or accumulation would gain here; None: nothing, or not known.

    Args:
        run: its steps are measured.
        link: what `dtkit.engine.probe` measured; empty: nothing.
    """
    view, link_ms = run.view(), _link_ms(run)
    if not link or not link_ms >= _LEAST_SHARE * view.step_ms:
        return None
    gains = {}
    carried_ms = 1000 * view.sent_bytes / link["bytes_per_s"]
    are_bytes = carried_ms >= _LEAST_EXPLAINED * link_ms
    if run.recipe.compress == "none" and are_bytes:
        for name, of_two in METHODS.items():
            ratio = of_two * 2 / len(view.ranks) if name in GATHERED else of_two
            saved_ms = min(link_ms, carried_ms * (1 - 1 / ratio))
            cost_ms = 1000 * view.raw_bytes * link["method_s_per_byte"][name]
            gains[f"--compress {name}"] = view.step_ms / (view.step_ms - saved_ms + cost_ms)
    if run.recipe.accumulate == 1:
        saved_ms = link_ms * (1 - 1 / _ACCUMULATE)
        gains[f"--accumulate {_ACCUMULATE} (a batch {_ACCUMULATE} × as large)"] = view.step_ms / (
            view.step_ms - saved_ms
        )
    said = [f"{name} about {gain:.1f} ×" for name, gain in gains.items() if gain >= _LEAST_GAIN]
    if not said:
        return None
    why = f"{format_bytes(view.sent_bytes)} at {format_bytes(link['bytes_per_s'])}/s"
    if not are_bytes:
        why = f"the way there and back, not the {format_bytes(view.sent_bytes)}"
    return (
        f"waiting for the link takes {format_percent(link_ms / view.step_ms)} of a step "
        f"({format_ms(link_ms)} of {format_ms(view.step_ms)} ms): {why}. "
        f"Estimated samples/s against now: {', '.join(said)}"
    )


def _link_ms(run: Run) -> float:
    """Return the milliseconds of a step that the link is waited for; NaN if it is not known.

    The least of the ranks' waiting: what others wait beyond that, they wait for a slow rank.
    """
    view = run.view()
    waits = [rank.comm_ms for rank in view.ranks]
    if view.step < _LEAST_STEPS or len(waits) == 1 or math.isnan(view.sent_bytes):
        return math.nan
    return min(waits)
