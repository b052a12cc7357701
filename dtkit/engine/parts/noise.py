"""The gradient noise scale, live: how large a batch this training can use.

source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, appendix A.1.
The trace of the covariance of one sample's gradient, over the squared length of the true
gradient: a number of samples. Both are estimated from what data parallel training has anyway,
the norm of a rank's own gradient and that of the average over ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.parts import Part

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.reduce import Bucket, Wire
    from dtkit.engine.run import ActiveRun

__all__ = ["make"]

EVERY_STEP_UNTIL = 64
"""Then one step in `PERIOD` is measured: the scale moves slowly, and norms cost time."""
PERIOD = 8
_EXACT = ("none", "fp16", "bf16")
"""Methods of compression that leave an average what it is, to rounding."""
DECAY = 0.95
"""Of the moving averages, per measurement."""

Pair = tuple[torch.Tensor, torch.Tensor]


class NoiseScale(Part):
    """Logs `noise_scale` as a numerator and a denominator; the driver adds up the ranks' ones.

    With b samples on each of W ranks and B = bW, the mean over ranks of
    (|g_b|² - |g_B|²) / (1/b - 1/B) is the trace, that of (B|g_B|² - b|g_b|²) / (B - b) the
    squared length. Both are linear in |g_b|², so every rank averages its own over time, and
    nothing is sent for it.

    It stays silent where it does not know: if several optimizers step, if gradients were
    averaged more than once in a step, if shares are unequal or not divided by dtkit,
    if compression changes the averages.
    """

    def __init__(self, run: ActiveRun, wire: Wire) -> None:
        self._recorder = run.recorder
        self._world_size = len(run.ranks)
        self._optimizer: Optimizer | None = None
        self._is_off = False
        self._is_void = False
        self._buckets: list[Bucket] = []
        self._local: list[torch.Tensor] = []
        self._found: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._sums: Pair | None = None
        wire.on_launch = self.saw_local

    def saw_local(self, bucket: Bucket) -> None:
        """Take the norm of this rank's own gradients, just before they are averaged."""
        step = self._recorder.num_steps
        if self._is_off or (step >= EVERY_STEP_UNTIL and step % PERIOD):
            return
        # What was averaged once in this step is no longer this rank's own.
        self._is_void |= self._found is not None or bucket in self._buckets
        self._buckets.append(bucket)
        self._local += _squares(bucket)

    def after_backward(self) -> None:
        """Take the norm of the averages: afterwards the cell may clip them."""
        num = self._recorder.even_share
        if not self._buckets or self._is_off or num is None:
            return
        averaged = [square for bucket in self._buckets for square in _squares(bucket)]
        if averaged and len(averaged) == len(self._local):
            self._found = (num, torch.stack(self._local).sum(), torch.stack(averaged).sum())

    def before_step(self, optimizer: Optimizer) -> None:
        """Stand back if it is not the only one that steps."""
        if self._optimizer not in (None, optimizer):
            self._is_off = True  # of two models that train in turn there is no one scale
        self._optimizer = optimizer

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Log the estimate so far under this step."""
        if self._found is not None and not self._is_void and not self._is_off:
            self._add(*self._found)
        self._clear()

    def _clear(self) -> None:
        self._is_void, self._found = False, None
        self._buckets, self._local = [], []

    def _add(self, num: int, local: torch.Tensor, averaged: torch.Tensor) -> None:
        total = num * self._world_size
        trace = (local - averaged) / (1 / num - 1 / total)
        length = (total * averaged - num * local) / (total - num)
        if self._sums is None:
            self._sums = (torch.zeros_like(trace), torch.zeros_like(length))
        # A GradScaler's scale multiplies both alike; where it is too large they are void.
        is_finite = torch.isfinite(trace) & torch.isfinite(length)
        self._sums = (
            torch.where(is_finite, DECAY * self._sums[0] + (1 - DECAY) * trace, self._sums[0]),
            torch.where(is_finite, DECAY * self._sums[1] + (1 - DECAY) * length, self._sums[1]),
        )
        self._recorder.log_ratio("noise_scale", *self._sums)


def _squares(bucket: Bucket) -> list[torch.Tensor]:
    """Return the squared lengths of a bucket's gradients, in double precision."""
    grads = [p.grad for p in bucket.params if p.grad is not None and not p.grad.is_sparse]
    if not grads:
        return []
    with torch.no_grad():
        norms = torch._foreach_norm(grads)  # noqa: SLF001  torch's own clipping uses it
        return [torch.stack(norms).double().square().sum()]


def make(run: ActiveRun) -> Part:
    """Return the part for a run: one that measures where dtkit averages, to rounding."""
    if run.wire is None or run.wire.compression.name not in _EXACT:
        return Part()
    return NoiseScale(run, run.wire)
