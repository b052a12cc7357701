"""One row per step from the rows of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import STEP_COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dtkit.telemetry._series import Smoother

    Floats = NDArray[np.float64]

__all__ = ["merge_steps"]


def merge_steps(block: Floats, smoother: Smoother) -> Floats:
    """Return the rows of steps that all ranks have made.

    Args:
        block: (num_ranks, num_columns, num_steps) float64, NaN where a rank has no such step.
        smoother: continues the smoothed loss.
    """
    column = {name: block[:, i, :] for i, name in enumerate(STEP_COLUMNS)}
    samples, loss = column["samples"], column["loss"]
    # A rank whose batch size is unknown counts like the others; a rank that
    # trained on nothing in this step (samples 0 while others have some) does not count.
    weight = np.where(np.nansum(samples, axis=0) > 0, samples, 1.0)
    weight = np.where(np.isnan(column["step"]) | _unseen(loss), 0.0, weight)
    total = weight.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_loss = np.where(weight > 0, weight * loss, 0.0).sum(axis=0) / total
        step_ms = np.nanmean(column["step_ms"], axis=0)
        rates = 1000.0 * samples / column["step_ms"] * np.sum(~np.isnan(samples), axis=0)
    return np.stack([
        np.nanmax(column["step"], axis=0),
        np.nanmax(column["time_s"], axis=0),
        mean_loss,
        smoother.extend(mean_loss),
        np.nansum(samples, axis=0),
        step_ms,
        np.nanmean(column["data_ms"], axis=0),
        np.nanmean(column["comm_ms"], axis=0),
        np.nanmax(column["lr"], axis=0, initial=-np.inf, where=~np.isnan(column["lr"])),
        np.nanmin(rates, axis=0),
        np.nanmax(rates, axis=0),
        _mean(column["sent_bytes"]),
        _mean(column["raw_bytes"]),
    ])  # fmt: skip


def _mean(values: Floats) -> Floats:
    """Return the mean over ranks of what is known, NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)
    return mean


def _unseen(loss: Floats) -> NDArray[np.bool_]:
    """Return where a rank reported no loss while another rank did.

    A NaN on every rank is a loss that really is NaN, or was never seen: it stays.
    """
    missing = np.isnan(loss)
    return missing & ~missing.all(axis=0)
