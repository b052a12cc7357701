"""Recorder: what one rank measures of a run, at a few microseconds a step."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from typing import IO, TYPE_CHECKING, Any

from dtkit.engine.meter import Meter
from dtkit.engine.pending import PendingLoss, read_losses
from dtkit.events import (
    STEP_COLUMNS,
    Event,
    GpuUse,
    LogBatch,
    Note,
    RankEnded,
    StepBatch,
    encode,
    flush_interval_s,
    until_flush_s,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

__all__ = ["Recorder"]

RING_STEPS = 65_536


class Recorder:
    """Takes the marks of one run, and sends and stores them in batches.

    The marks are made on the training thread and cost no I/O and no device
    synchronisation: values on a GPU are kept as tensors and read by the thread
    that flushes them, up to ten times a second.

    Args:
        rank: this rank.
        device: whose memory is reported.
        start_unix_s: the run's start, seconds since the epoch.
        path: file that the events are appended to, a JSON line each.
        send: takes the same events to the driver.
        num_ranks: that take part in the run.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        start_unix_s: float,
        path: Path,
        send: Callable[[list[Event]], None],
        *,
        num_ranks: int = 1,
    ) -> None:
        self.rank = rank
        self._interval_s = flush_interval_s(num_ranks)
        self.num_steps: int = 0
        """Counted by whoever sees a step end; what is logged from then on is that step's."""
        self.batch_size: int = 0
        self.num_holders = 1
        self.has_sent: bool = False
        """Whether it is known what this rank sends to average gradients."""
        self.device = device
        self._send = send
        self._path = path
        self._file: IO[bytes] | None = None
        self._is_storing = True
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=RING_STEPS)
        self._log: deque[tuple[int, float, dict[str, Any]]] = deque()
        self._outbox: deque[Event] = deque()
        self._meter = Meter(device)
        self._num_dropped = 0
        # time.time() can jump; offsets are taken on the monotonic clock.
        self._zero_s = time.perf_counter() - (time.time() - start_unix_s)
        self._last_s = time.perf_counter()
        self._clear()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="dtkit-recorder", daemon=True)

    def start(self) -> None:
        """Begin to send and store, on a thread; `close` ends it."""
        self._thread.start()

    def _clear(self) -> None:
        self._loss = 0.0
        self._num_losses = 0
        self._device_losses: list[tuple[torch.Tensor, float]] = []
        self._samples = 0.0
        self._even = 0.0
        self._has_whole = False
        self._data_s = 0.0
        self._comm_s = 0.0
        self._held_weight = self._held_loss = 0.0
        self._held_on_device: list[tuple[torch.Tensor, float]] = []
        self._sent_bytes = self._raw_bytes = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run's start."""
        return time.perf_counter() - self._zero_s

    def saw_loss(self, loss: torch.Tensor, weight: float) -> float | None:
        """Add a loss that is being backpropagated; their weighted sum is the step's loss.

        Returns:
            The loss as a number, None if it is on a device still.
        """
        self._num_losses += 1
        if loss.is_cpu:
            value: float = loss.item()
            self._loss += weight * value
            return value
        self._device_losses.append((loss.detach(), weight))
        return None

    def saw_batch(
        self, num_samples: int, even: float, wait_s: float, *, is_whole: bool = False
    ) -> None:
        """Add a batch that the cell got from a DataLoader.

        Args:
            num_samples: how many samples of it count.
            even: how many would, if the global batch had been divided evenly.
            wait_s: how long the cell waited for it.
            is_whole: whether it was not divided.
        """
        self._has_whole |= is_whole
        self.batch_size = num_samples
        self._samples += num_samples / self.num_holders
        self._even += even / self.num_holders
        self._data_s += wait_s

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for other ranks' gradients."""
        self._comm_s += seconds

    def sent(self, sent_bytes: float, raw_bytes: float) -> None:
        """Add what was sent to average gradients, and what it would have been uncompressed."""
        self.has_sent = True
        self._sent_bytes += sent_bytes
        self._raw_bytes += raw_bytes

    def held(self, ratio: float) -> None:
        """Keep the losses so far for a later step, which is their mean in these ratios."""
        self._held_weight += ratio
        self._held_loss += ratio * self._loss
        self._held_on_device += [(loss, ratio * weight) for loss, weight in self._device_losses]
        self._loss = 0.0
        self._device_losses = []

    def stepped(self, lr: float, ratio: float = 1.0) -> None:
        """Close the row of step number `num_steps`: everything since the last row belongs to it.

        Args:
            lr: the learning rate.
            ratio: what the losses since the last call of `held` weigh.
        """
        if self._held_weight:
            self.held(ratio)
            self._loss, self._device_losses = self._held_loss, self._held_on_device
        now_s = time.perf_counter()
        if len(self._ring) == RING_STEPS:
            self._num_dropped += 1
        self._ring.append((
            self.num_steps,
            now_s - self._zero_s,
            self._step_loss(),
            self._samples,
            1000.0 * (now_s - self._last_s),
            1000.0 * self._data_s,
            1000.0 * self._comm_s,
            lr,
            *((self._sent_bytes, self._raw_bytes) if self.has_sent else (math.nan, math.nan)),
        ))  # fmt: skip
        self._last_s = now_s
        self._clear()

    def skipped(self) -> None:
        """Drop what was collected for a step that the GradScaler skipped."""
        self._clear()

    @property
    def even_share(self) -> int | None:
        """Samples of this rank in the step that goes on; None if it has not an even share."""
        is_even = self._samples and self._samples == self._even and not self._has_whole
        return int(self._samples) if is_even and self.num_holders == 1 else None

    def log_ratio(self, name: str, numerator: Any, denominator: Any) -> None:
        """Keep a metric that is a ratio: of the ranks' sums, not a mean of their ratios."""
        self._log.append((self.num_steps, self.elapsed_s, {name: (numerator, denominator)}))

    def log(self, metrics: dict[str, Any]) -> None:
        """Keep metrics under the current step; tensors are read later."""
        self._log.append((self.num_steps, self.elapsed_s, metrics))

    def emit(self, event: Event) -> None:
        """Send an event with the next batch."""
        self._outbox.append(event)

    def ended(self, state: str, summary: dict[str, Any] | None = None) -> None:
        """Say that the rank has left the run; what it sent after its last step has no row."""
        rest = {"sent_bytes": self._sent_bytes} if self._sent_bytes else {}
        summary = {**(summary or {}), **rest}
        self.emit(RankEnded(self.rank, state, self.num_steps, self.elapsed_s, summary))

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        if self._outbox:  # storing failed just now
            self.flush()
        self._close_file()
        self._meter.close()

    def flush(self) -> None:
        """Send and store everything collected so far."""
        with self._lock:
            self._meter.sample_memory()
            reading = self._meter.sample_gpu()
            if reading is not None:
                self.emit(GpuUse(self.rank, self.num_steps, self.elapsed_s, *reading))
            events = self._drain()
            if events:
                self._store(events)
                self._send(events)

    def _run(self) -> None:
        while not self._stop.wait(until_flush_s(self._interval_s, time.time())):
            self.flush()

    def _store(self, events: list[Event]) -> None:
        if not self._is_storing:
            return
        try:
            if self._file is None:
                # On another host than the driver's it need not be there yet.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab")
            self._file.write(b"".join(encode(event) + b"\n" for event in events))
            self._file.flush()
        except OSError as error:
            # A full disk is no reason to lose the run: the driver still gets it all.
            self._is_storing = False
            self._close_file()
            self.emit(Note(self.rank, f"the run is not stored on disk any more: {error}"))

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried again
                self._file.close()

    def _step_loss(self) -> float | PendingLoss:
        if not self._num_losses or (self._even and not self._samples):
            return math.nan
        # The ranks' losses will be averaged by samples, and theirs are weighted
        # by samples already: per batch, which for several batches is not the same.
        factor = self._even / self._samples if self._samples else 1.0
        factor /= self._held_weight or 1.0
        if self._device_losses:
            return PendingLoss(self._loss, self._device_losses, factor)
        return factor * self._loss

    def _drain(self) -> list[Event]:
        waiting = [self._outbox.popleft() for _ in range(len(self._outbox))]
        # A rank's end is the last that is heard of it: its steps come before.
        last = [event for event in waiting if isinstance(event, RankEnded)]
        events = [event for event in waiting if not isinstance(event, RankEnded)]
        rows = [self._ring.popleft() for _ in range(len(self._ring))]
        if rows:
            columns = dict(zip(STEP_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
            columns["loss"] = read_losses(columns["loss"])
            dropped, self._num_dropped = self._num_dropped, 0
            events.append(StepBatch(self.rank, columns, self._meter.peak_bytes, dropped))
        records = [self._log.popleft() for _ in range(len(self._log))]
        if records:
            steps, times, metrics = map(list, zip(*records, strict=True))
            values = [{k: _number(v) for k, v in m.items()} for m in metrics]
            events.append(LogBatch(self.rank, steps, times, values))
        return events + last


def _number(value: Any) -> float | list[float]:
    return list(map(float, value)) if isinstance(value, tuple) else float(value)
