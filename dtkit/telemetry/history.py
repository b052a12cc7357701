"""The whole curve of a run as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.telemetry.news import ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dtkit.telemetry._series import Rows

    Floats = NDArray[np.float64]

__all__ = ["History", "history_of"]


class History(Mapping[str, "NDArray[np.float64]"]):
    """Columns of equal length, one row per step; `history["loss"][-1]` is the last loss.

    Columns: `step`, `time_s` (since the run's start), `loss` (mean over ranks
    weighted by samples), `samples_per_s` (all ranks), `step_ms`, `compute_ms`,
    `data_ms`, `comm_ms` (means over ranks), `lr`, `sent_bytes` (what a rank sent
    to average gradients) and `raw_bytes` (what it would have sent without
    compression; both NaN where the cell averages by itself), and every metric
    given to `dtkit.log` (mean over ranks; NaN in steps that did not log it), and every live
    control that is a number (`lr_factor` if it was changed).
    Each is (num_steps,) float64.
    """

    def __init__(self, columns: dict[str, NDArray[np.float64]]) -> None:
        self._columns = columns

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        try:
            return self._columns[name]
        except KeyError:
            msg = f"no column {name!r}; there are: {', '.join(self._columns)}"
            raise KeyError(msg) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Return the number of columns, as a mapping does; rows: `num_steps`."""
        return len(self._columns)

    @property
    def num_steps(self) -> int:
        """Number of rows."""
        return len(self._columns["step"])

    def to_pandas(self) -> Any:  # Any: pandas is not a dependency
        """Return the columns as a pandas DataFrame indexed by step.

        Raises:
            ModuleNotFoundError: pandas is not installed (`pip install pandas`).
        """
        import pandas as pd  # optional dependency

        return pd.DataFrame(self._columns).set_index("step")

    def __repr__(self) -> str:
        return f"History({self.num_steps} steps: {', '.join(self._columns)})"


def history_of(
    rows: Rows,
    logged: Mapping[str, Mapping[int, tuple[float, float]]],
    log_time_s: Mapping[int, float],
    controls: Mapping[str, Floats],
) -> History:
    """Return the columns of merged steps and of what was logged; a copy.

    Args:
        rows: the merged steps.
        logged: by metric and step, the sum over the ranks and how many they were.
        log_time_s: seconds since the run's start, by step.
        controls: by live control, its value in each merged step.
    """
    steps = rows["step"].copy()
    extra = sorted(set(log_time_s) - set(steps.astype(int)))
    order = np.argsort(np.concatenate([steps, extra]), kind="stable")

    def column(values: Floats, at_extra: list[float] | None = None) -> Floats:
        tail = np.full(len(extra), np.nan) if at_extra is None else np.array(at_extra)
        merged: Floats = np.concatenate([values, tail])[order]
        return merged

    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(rows["samples"] > 0, 1000.0 * rows["samples"] / rows["step_ms"], np.nan)
    columns = {
        "step": column(steps, [float(s) for s in extra]),
        "time_s": column(rows["time_s"], [log_time_s[s] for s in extra]),
        "loss": column(rows["loss"]),
        "samples_per_s": column(rate),
        "step_ms": column(rows["step_ms"]),
        "compute_ms": column(rows["step_ms"] - rows["data_ms"] - rows["comm_ms"]),
        "data_ms": column(rows["data_ms"]),
        "comm_ms": column(rows["comm_ms"]),
        "lr": column(rows["lr"]),
        "sent_bytes": column(rows["sent_bytes"]),
        "raw_bytes": column(rows["raw_bytes"]),
    }
    at = {int(step): i for i, step in enumerate(columns["step"])}
    for name, values in logged.items():
        found = np.full(len(at), np.nan)
        for step, (total, count) in values.items():
            found[at[step]] = ratio(total, count)
        columns[name if name not in columns else f"logged_{name}"] = found
    for name, used in controls.items():
        columns[name if name not in columns else f"control_{name}"] = column(used)
    return History(columns)
