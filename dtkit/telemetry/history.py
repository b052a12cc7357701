"""The whole curve of a run as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["History"]


class History(Mapping[str, "NDArray[np.float64]"]):
    """Columns of equal length, one row per step; `history["loss"][-1]` is the last loss.

    Columns: `step`, `time_s` (since the run's start), `loss` (mean over ranks
    weighted by samples), `samples_per_s` (all ranks), `step_ms`, `compute_ms`,
    `data_ms`, `comm_ms` (means over ranks), `lr`, `sent_bytes` (what a rank sent
    to average gradients) and `raw_bytes` (what it would have sent without
    compression; both NaN where the cell averages by itself), and every metric
    given to `dtkit.log` (mean over ranks; NaN in steps that did not log it).
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
