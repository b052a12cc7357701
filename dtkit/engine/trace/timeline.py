"""The timeline of a run on one rank: its phases and its collectives, step by step.

Marks are taken on the training thread, a few microseconds a step; a thread
writes them. The driver makes one trace of all ranks' files.

Times are the host's. On a GPU they say when work was handed over, and when the
host waited; what the device did meanwhile is for `--profile` to show.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dtkit.engine.parts import Part
from dtkit.engine.trace.clock import Offset, measure_offset
from dtkit.engine.trace.collectives import Collectives
from dtkit.engine.trace.ddp import SeenReplicas
from dtkit.engine.trace.files import RowFile
from dtkit.trace.rows import PHASES, Clock, Head, part_path

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["Timeline", "make"]

_DATA, _FORWARD, _BACKWARD, _COMMUNICATION, _OPTIMIZER = range(len(PHASES))


class Timeline(Part):
    """Marks where each phase of a step begins and ends.

    Args:
        run: the run.
        num_steps: how many of the last steps are kept; None: all.
        mark_cycles: whether the trace marks where each step begins.
    """

    def __init__(self, run: ActiveRun, *, num_steps: int | None, mark_cycles: bool) -> None:
        self._run = run
        self._num_steps = num_steps
        self._mark_cycles = mark_cycles
        self._stack = ExitStack()
        self._file: RowFile | None = None
        self._spans: list[tuple[int, int, int]] = []
        self._collectives = Collectives(self._waited_for)
        self._replicas = SeenReplicas(self._collectives)
        self._offset = Offset()
        self._wait_ns = 0
        self._mark_ns = self._step_ns = 0
        self._optimizer_ns = 0

    def begin(self) -> None:
        """Compare the clocks, and begin to record."""
        run = self._run
        if len(run.ranks) > 1:
            self._offset = measure_offset(run.rank, run.ranks)
        now_ns = time.perf_counter_ns()
        head = Head(
            rank=run.rank, ranks=run.ranks, host=run.host, device=str(run.device),
            backend=run.backend, start_unix_s=time.time(), start_ns=now_ns,
            offset_ns=self._offset.offset_ns, error_ns=self._offset.error_ns,
            mark_cycles=self._mark_cycles,
        )  # fmt: skip
        path = part_path(run.dir, run.rank)
        self._file = RowFile(path, head, self._collectives, self._num_steps, run.note)
        self._stack.callback(self._file.close)
        self._stack.enter_context(self._collectives.recording())
        self._stack.enter_context(self._replicas.watching())
        self._mark_ns = self._step_ns = time.perf_counter_ns()

    def saw_batch(self, wait_s: float) -> None:
        """Mark the wait for a batch; what follows is the forward pass."""
        now_ns = time.perf_counter_ns()
        self._spans.append((_DATA, now_ns - int(1e9 * wait_s), now_ns))
        self._mark_ns = now_ns

    def before_backward(self) -> None:
        """Mark the forward pass."""
        self._replicas.before_backward()
        now_ns = time.perf_counter_ns()
        self._spans.append((_FORWARD, self._mark_ns, now_ns))
        self._mark_ns, self._wait_ns = now_ns, 0

    def waited(self, seconds: float) -> None:
        """Mark a wait for other ranks' gradients."""
        now_ns = time.perf_counter_ns()
        start_ns = now_ns - int(1e9 * seconds)
        self._wait_ns = self._wait_ns or start_ns
        self._spans.append((_COMMUNICATION, start_ns, now_ns))

    def after_backward(self) -> None:
        """Mark the backward pass, at whose end the other ranks were waited for."""
        if ddp_ns := self._replicas.waited_ns():
            self.waited(ddp_ns / 1e9)
        now_ns = time.perf_counter_ns()
        self._spans.append((_BACKWARD, self._mark_ns, self._wait_ns or now_ns))
        self._mark_ns, self._wait_ns = now_ns, 0

    def before_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002  a Part's signature
        """Mark the optimizer's beginning."""
        self._optimizer_ns = time.perf_counter_ns()

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Mark its end, and close the step."""
        now_ns = time.perf_counter_ns()
        self._spans.append((_OPTIMIZER, self._optimizer_ns, now_ns))
        spans, self._spans = self._spans, []
        assert self._file is not None  # noqa: S101  for the type checker: it has begun
        self._file.add([step, self._step_ns, now_ns, spans, self._collectives.take()])
        self._mark_ns = self._step_ns = now_ns

    def end(self, state: str) -> None:
        """Take the hooks away and write what is left, with how far the clocks have drifted."""
        run = self._run
        is_whole = state in ("finished", "stopped") and not run.recipe.is_free
        if self._file is not None and self._offset.has_hosts and is_whole:
            # Another rank may have failed: this one is freed then, and the first measure counts.
            with contextlib.suppress(RuntimeError):
                offset_ns, error_ns, _ = measure_offset(run.rank, run.ranks)
                self._file.clock = Clock(time.perf_counter_ns(), offset_ns, error_ns)
        self._stack.close()

    def _waited_for(self, start_ns: int, end_ns: int) -> None:
        self._spans.append((_COMMUNICATION, start_ns, end_ns))


def make(run: ActiveRun, **options: Any) -> Part:  # Any: as `RunOptions.parts` gives them
    """Return the part for a run."""
    return Timeline(run, **options)
