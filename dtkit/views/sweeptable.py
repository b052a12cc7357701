"""What came of runs that are compared: at equal samples and at equal time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dtkit.telemetry import History

    Floats = NDArray[np.float64]

__all__ = ["Outcome", "compare", "samples_and_seconds", "smoothed_loss"]

_WINDOW = 0.1
"""Of the samples at which losses are compared, that they are averaged over."""
_NAN = math.nan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run among others; unknown numbers are NaN.

    Attributes:
        label: what distinguishes it.
        state: of the run.
        error: why it failed or was refused.
        num_steps: optimizer steps.
        num_samples: over all ranks.
        loss: smoothed, at the end.
        loss_at_samples: after as many samples as every finished run has seen.
        equal_samples: how many that are.
        loss_at_time: after as long as every finished run has trained.
        equal_s: how long that is, in seconds.
        samples_per_s: over all ranks, in the whole run but its first step.
        sent_bytes: of a rank in a step, to average gradients.
        peak_gib: of device memory, on CPU of resident memory; the largest of the ranks'.
        train_s: seconds from the first step's end to the last one's.
    """

    label: str
    state: str
    error: str = ""
    num_steps: int = 0
    num_samples: float = _NAN
    loss: float = _NAN
    loss_at_samples: float = _NAN
    equal_samples: float = _NAN
    loss_at_time: float = _NAN
    equal_s: float = _NAN
    samples_per_s: float = _NAN
    sent_bytes: float = _NAN
    peak_gib: float = _NAN
    train_s: float = _NAN


def compare(
    runs: Sequence[tuple[str, str, str, History | None, float]],
) -> list[Outcome]:
    """Return what came of each run.

    Args:
        runs: label, state, error, history and peak memory in GiB of each.
    """
    curves = [None if h is None or not h.num_steps else samples_and_seconds(h)
              for *_, h, _ in runs]  # fmt: skip
    ends = [
        (samples[-1], seconds[-1])
        for (_, state, *_), curve in zip(runs, curves, strict=True)
        if curve is not None and state == "finished"
        for samples, seconds in [curve]
    ]
    equal_samples = min((samples for samples, _ in ends if samples > 0), default=_NAN)
    equal_s = min((seconds for _, seconds in ends), default=_NAN)
    return [
        Outcome(label, state, error)
        if history is None or curve is None
        else _outcome(label, state, error, history, peak_gib, equal_samples, equal_s)
        for (label, state, error, history, peak_gib), curve in zip(runs, curves, strict=True)
    ]


def samples_and_seconds(history: History) -> tuple[Floats, Floats]:
    """Return, for each step, the samples seen by then and the seconds since the first was done.

    The first step begins before there is anything to train with.
    """
    samples = np.nan_to_num(history["samples_per_s"] * history["step_ms"] / 1000.0)
    return np.cumsum(samples), history["time_s"] - history["time_s"][0]


def smoothed_loss(history: History, num_samples: float) -> Floats:
    """Return each step's loss averaged with those before it, over as many samples.

    By samples, not by steps: an epoch's last batch may be of a few samples, whose loss says
    little, and runs of different batches are to be averaged over the same stretch.
    """
    seen, _ = samples_and_seconds(history)
    loss = history["loss"]
    if not seen[-1]:
        return loss
    weights = np.diff(seen, prepend=0.0)
    low = np.searchsorted(seen, seen - max(num_samples, 1.0) * (1 - 1e-9), side="right")
    low = np.minimum(low, np.arange(len(seen)))

    def over_window(values: Floats) -> Floats:
        sums = np.cumsum(np.append(0.0, values))
        within: Floats = sums[1:] - sums[low]
        return within

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = over_window(np.where(np.isfinite(loss), weights * loss, 0.0)) / over_window(weights)
    return np.where(over_window(~np.isfinite(loss) * 1.0) > 0, np.nan, mean)


def _outcome(  # noqa: PLR0917  what is compared, and at what
    label: str, state: str, error: str, history: History, peak_gib: float,
    equal_samples: float, equal_s: float,
) -> Outcome:  # fmt: skip
    samples, seconds = samples_and_seconds(history)
    window = _WINDOW * (samples[-1] if math.isnan(equal_samples) else equal_samples)
    loss = smoothed_loss(history, window)
    # The first step loads what later ones find loaded.
    ms = np.nansum(history["step_ms"][1:])
    rate = 1000.0 * (samples[-1] - samples[0]) / ms if ms > 0 else _NAN
    sent = history["sent_bytes"] if "sent_bytes" in history else np.empty(0)
    sent = sent[np.isfinite(sent)]
    return Outcome(
        label, state, error,
        num_steps=history.num_steps,
        num_samples=float(samples[-1]) or _NAN,
        loss=float(loss[-1]),
        loss_at_samples=_at(samples, loss, equal_samples),
        equal_samples=equal_samples,
        loss_at_time=_at(seconds, loss, equal_s),
        equal_s=equal_s,
        samples_per_s=float(rate) or _NAN,
        sent_bytes=float(np.mean(sent)) if len(sent) else _NAN,
        peak_gib=peak_gib,
        train_s=float(seconds[-1]),
    )  # fmt: skip


def _at(where: Floats, loss: Floats, limit: float) -> float:
    """Return the loss of the last step up to the limit; NaN if the run did not get there."""
    reached = np.flatnonzero(where <= limit * (1 + 1e-9))
    if math.isnan(limit) or not len(reached) or where[-1] < limit * (1 - 1e-9):
        return _NAN
    return float(loss[reached[-1]])
