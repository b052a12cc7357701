"""Trainings that live at the same time and compute in turns, a second each.

A machine that is shared with others changes its speed from one second to the
next, and a step is to be compared to a hundredth. So neither side is run as a
whole: all are started, each waits before each of its blocks, and blocks
alternate A B, B A, … While one side computes the others are stopped (SIGSTOP), so that a
dashboard cannot draw in another's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import psutil

__all__ = ["Baton", "Timed", "alternate"]

_BLOCK_TIMEOUT_S = 120.0
_CHECK_S = 0.5
WARM_STEPS = 2
"""Not counted at the start of each block: the first waited for the turn, caches are cold."""


class Side(Protocol):
    """What takes turns."""

    def check(self) -> None:
        """Raise if it failed."""

    def processes(self) -> list[psutil.Process]:
        """Return all its processes."""


class Baton:
    """The two FIFOs through which a training is told to go, and tells that it waits."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = (folder / "done", folder / "go")
        for path in self.paths:
            os.mkfifo(path)
        # For reading and writing, so that opening does not wait for the other end.
        self._done, self._go = (os.open(path, os.O_RDWR) for path in self.paths)

    def wait(self, side: Side) -> None:
        """Wait until the training waits for its turn."""
        deadline = time.monotonic() + _BLOCK_TIMEOUT_S
        while not select.select([self._done], [], [], _CHECK_S)[0]:
            side.check()
            if time.monotonic() > deadline:
                msg = f"no block was finished in {_BLOCK_TIMEOUT_S:.0f} s"
                raise BenchmarkError(msg)
        os.read(self._done, 1)

    def give(self) -> None:
        """Let it compute one block."""
        os.write(self._go, b"g")

    def put_back(self) -> None:
        """Undo a `wait`: the next one returns at once."""
        os.write(self._done, b"d")  # opened for both

    def close(self) -> None:
        """Close the FIFOs."""
        os.close(self._done)
        os.close(self._go)


@dataclass(frozen=True, slots=True)
class Timed:
    """What one side measured.

    Attributes:
        blocks_s: seconds of each counted step, by block.
        cpu_s: CPU time of rank 0 per step, by block: blind to who else uses the machine.
        loss: of the last step.
    """

    blocks_s: tuple[tuple[float, ...], ...]
    cpu_s: tuple[float, ...]
    loss: float

    @property
    def num_steps(self) -> int:
        """Steps that were counted."""
        return sum(len(block) for block in self.blocks_s)

    @classmethod
    def read(cls, path: Path, *, num_warm_blocks: int, num_warm_steps: int = WARM_STEPS) -> Timed:
        """Read what the cell wrote."""
        facts: dict[str, Any] = json.loads(path.read_text())
        blocks = facts["times_s"][num_warm_blocks:]
        return cls(
            tuple(tuple(block[num_warm_steps:]) for block in blocks),
            tuple(facts["cpu_s"][num_warm_blocks:]),
            facts["loss"],
        )

    @classmethod
    def joined(cls, parts: Sequence[Timed]) -> Timed:
        """Return the blocks of several runs as if they were one's; the loss is the last one's."""
        return cls(
            tuple(block for part in parts for block in part.blocks_s),
            tuple(cpu_s for part in parts for cpu_s in part.cpu_s),
            parts[-1].loss,
        )


def alternate(sides: Sequence[tuple[Side, Baton]], num_blocks: int) -> None:
    """Let trainings compute `num_blocks` blocks each, in the order A B, B A, and so on.

    All must have been started; on return all are about to end.
    """
    for side, baton in sides:
        baton.wait(side)
    stopped = [_stop(side) for side, _ in sides]
    try:
        for i in range(num_blocks):
            for k in range(len(sides))[:: 1 if i % 2 == 0 else -1]:
                side, baton = sides[k]
                _go_on(stopped[k])
                baton.give()
                baton.wait(side)
                stopped[k] = _stop(side)
    finally:
        for processes in stopped:
            _go_on(processes)
    for _, baton in sides:
        baton.give()


def _stop(side: Side) -> list[psutil.Process]:
    """Stop all processes of a side and return them."""
    processes = side.processes()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
    return processes


def _go_on(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
