"""A run as TensorBoard's event files: one writer per run, on the driver, from the merged events.

The ranks pay nothing, and each curve is that of all ranks together. Should the
driver be killed, the run's own folder still has everything: a run that was read
back is written like one that goes on.

TensorFlow is not needed, and torch is not loaded: TensorBoard's own protocol
buffers and record writer are enough.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dtkit.tensorboard import hparams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from dtkit.telemetry import News

    Floats = NDArray[np.float64]

__all__ = ["MAX_POINTS_PER_ROUND", "TensorBoardThread", "TensorBoardWriter", "tag_of"]

MAX_POINTS_PER_ROUND = 500
"""Of a model that makes thousands of steps a second not every one is written while it runs:
TensorBoard itself keeps 1,000 points of a curve, and each costs the driver about 20 µs."""
_SUFFIX = ".dtkit"
_INTERVAL_S = 1.0
_SKIPPED = ("step", "time_s", "smooth", "samples", "rate_low", "rate_high")
_TRAIN = ("loss", "lr", "grad_norm", "noise_scale")


class TensorBoardWriter:
    """Writes what is new of a run each time it is asked to; begins with its first step.

    What an earlier writer wrote of the run is removed: it would be a second curve.

    Args:
        news: `RunState.news`.
        folder: gets the event file.
        start_unix_s: the run's start.
        settings: what it was trained with: the recipe and more, by name.
        graph: where the first rank puts the model's graph, if it is to.
    """

    def __init__(
        self,
        news: Callable[[int, int, int | None], News],
        folder: Path,
        start_unix_s: float,
        settings: dict[str, Any],  # Any: JSON
        graph: Path | None = None,
    ) -> None:
        self._news = news
        self._graph = graph
        self._start_unix_s = start_unix_s
        for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
            old.unlink()
        self._file = EventFileWriter(str(folder), 10_000, 2, _SUFFIX)
        self._num_rows = 0
        self._metrics_to = 0
        self._newest_step = 0
        self._peaks_gib: dict[int, float] = {}
        for value in hparams.beginning(
            settings, start_unix_s, ("train/loss", "speed/samples_per_s")
        ):
            self._add(start_unix_s, 0, value)
        self._file.flush()

    def write_new(self, *, is_last: bool = False) -> None:
        """Write the steps that have been merged since the last call.

        Metrics of `dtkit.log` follow one call later: by then those of all ranks are here.
        """
        upto = None if is_last else self._newest_step
        news = self._news(self._num_rows, self._metrics_to, upto)
        self._metrics_to, self._newest_step = self._newest_step, news.step
        self._num_rows += len(news.rows["step"])
        for name, column in news.rows.items():
            if name not in _SKIPPED:
                points = np.stack([news.rows["step"], news.rows["time_s"], column], axis=1)
                self._write(tag_of(name), points)
        for name, points in news.metrics.items():
            self._write(tag_of(name, is_logged=True), points)
        self._write_peaks(news)
        if self._graph is not None and self._graph.exists():
            self._file.add_event(Event(graph_def=self._graph.read_bytes()))
            self._graph = None
        self._file.flush()

    def close(self, state: str, end_unix_s: float) -> None:
        """Write what is left, and how the run ended."""
        self.write_new(is_last=True)
        self._add(end_unix_s, 0, hparams.ending(state, end_unix_s))
        self._file.close()

    def _write(self, tag: str, points: Floats) -> None:
        """Write (num_points, 3) of step, seconds since the start, value."""
        points = points[np.isfinite(points[:, 2]) | (tag == "train/loss")]
        if len(points) > MAX_POINTS_PER_ROUND:
            kept = np.linspace(0, len(points) - 1, MAX_POINTS_PER_ROUND).astype(int)
            points = points[kept]
        for step, time_s, value in points.tolist():
            scalar = Summary.Value(tag=tag, simple_value=value)
            self._add(self._start_unix_s + time_s, int(step), scalar)

    def _write_peaks(self, news: News) -> None:
        for rank, peak_gib in news.peaks_gib.items():
            if news.step and self._peaks_gib.get(rank) != peak_gib:
                self._peaks_gib[rank] = peak_gib
                self._write(
                    f"memory/peak_gib_rank{rank}", np.array([[news.step, news.time_s, peak_gib]])
                )

    def _add(self, wall_time_s: float, step: int, value: Any) -> None:  # Any: Summary.Value
        self._file.add_event(
            Event(wall_time=wall_time_s, step=step, summary=Summary(value=[value]))
        )


class TensorBoardThread:
    """Writes a run that goes on, once a second, until it is closed."""

    def __init__(self, writer: TensorBoardWriter) -> None:
        self._writer = writer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dtkit-tensorboard", daemon=True)
        self._thread.start()

    def close(self, state: str, end_unix_s: float) -> None:
        """Write what is left and end the thread."""
        self._stop.set()
        self._thread.join()
        self._writer.close(state, end_unix_s)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            with contextlib.suppress(OSError):  # the disk is full: told of at the end
                self._writer.write_new()


def tag_of(name: str, *, is_logged: bool = False) -> str:
    """Return the tag under which TensorBoard shows a column of a run."""
    if name in _TRAIN:
        return f"train/{name}"
    if is_logged:
        return f"metrics/{name}"
    if name.endswith("_ms"):
        return f"time/{name}"
    if name.endswith(("_bytes", "_gib")):
        return f"bytes/{name}"
    return f"speed/{name}"
