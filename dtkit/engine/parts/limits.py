"""Where a trial of a cell ends: after some steps, or when it takes more memory than it may."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psutil
import torch

from dtkit.engine.control import RunStopped
from dtkit.engine.parts import Part

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["make_budget", "make_lr_range", "make_steps"]

_MEMORY_SHARE = 0.8
"""Of the host's free memory, that trials of all ranks together may take."""


class Steps(Part):
    """Ends the run after some steps, at the boundary that all ranks pass alike."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def boundary(self, step: int) -> None:
        """Stop here if it was the last step."""
        __tracebackhide__ = True
        if step >= self._num_steps:
            raise RunStopped


class Budget(Part):
    """Lets memory run out on a CPU as it does on a GPU: with an error, before the host is full.

    The limit is the process's own (RLIMIT_DATA), so the allocation that would pass it fails.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._before: tuple[int, int] | None = None

    def begin(self) -> None:
        """Set the limit."""
        self._before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _data_bytes() + self._budget_bytes
        for known in (soft, hard):
            limit = limit if known == resource.RLIM_INFINITY else min(limit, known)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

    def end(self, state: str) -> None:  # noqa: ARG002  a Part's signature
        """Take the limit away."""
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)


class LrRange(Part):
    """Raises the learning rate exponentially, step by step, whatever the cell sets it to.

    The control `lr_factor` multiplies it like the cell's own; the rate that was used is recorded.
    Groups of an optimizer with other learning rates keep their ratio to the first one's.
    """

    def __init__(self, low: float, high: float, num_steps: int) -> None:
        self._low, self._ratio, self._num_steps = low, high / low, num_steps
        self._factors: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
        self._step = 0

    def before_step(self, optimizer: Optimizer) -> None:
        """Set the learning rate of this step."""
        groups = optimizer.param_groups
        factors = self._factors.setdefault(
            optimizer, [float(g["lr"]) / (float(groups[0]["lr"]) or 1.0) for g in groups]
        )
        lr = self._low * self._ratio ** (self._step / max(1, self._num_steps - 1))
        for group, factor in zip(groups, factors, strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Go on to the next learning rate."""
        self._step = step


def make_steps(_run: ActiveRun, *, num_steps: int) -> Part:
    """Return the part that ends a run after some steps."""
    return Steps(num_steps)


def make_lr_range(_run: ActiveRun, *, low: float, high: float, num_steps: int) -> Part:
    """Return the part that raises the learning rate from `low` to `high`."""
    return LrRange(low, high, num_steps)


def make_budget(run: ActiveRun, *, memory_bytes: int | None) -> Part:
    """Return the part that limits memory; a GPU has its own limit.

    Args:
        run: the run.
        memory_bytes: more than the process has now; None: this rank's part of what is free.
    """
    if run.recorder.device.type != "cpu":
        return Part()
    if memory_bytes is None:
        free = psutil.virtual_memory().available
        memory_bytes = int(_MEMORY_SHARE * free / len(run.ranks))
    return Budget(memory_bytes)


def _data_bytes() -> int:
    """Return what counts for RLIMIT_DATA: the process's private writable memory."""
    fields: dict[str, Any] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return 1024 * int(fields["VmData"].split()[0])
