"""What every peer runs. A text is the same for all, but for the lines that Horovod wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cells import collective, endless, first_step, training
from benchmarks.peers.peer import Text

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.cells import Kind
    from benchmarks.peers.peer import Dialect

__all__ = [
    "ERROR",
    "NUM_LINES",
    "PASS",
    "Texts",
    "last_lines",
]

NUM_LINES = 10_000
ERROR = "the first to fail"
"""What the error says; a text writes it in two parts, so that it is not seen in its source."""
_STEPS = 20
_KEPT = 41

_JOIN: dict[Dialect, str] = {
    "torch": """\
import os, time
import torch
import torch.distributed as dist
if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, barrier, reduce = dist.get_rank(), dist.barrier, dist.all_reduce
""",
    "horovod": """\
import os, time
import torch
import horovod.torch as hvd
hvd.init()
rank, barrier, reduce = hvd.rank(), hvd.barrier, hvd.allreduce
""",
}

_NOTE = """\
with open({out!r} + str(rank), "w") as file:
    file.write(repr(time.monotonic()))
"""

_KEEP = f"""\
kept = {_KEPT}
"""

_IS_KEPT = f"""\
assert kept == {_KEPT}
"""

_REDUCE = """\
reduce(torch.ones(1))
"""

_LINES = f"""\
for i in range({NUM_LINES}):
    print(f"line {{i}} of rank {{rank}}")
"""

_FAIL = """\
barrier()
if rank == 1:
    with open({out!r} + "1", "w") as file:
        file.write(repr(time.monotonic()))
    raise ValueError("{first}" + "{second}")
reduce(torch.ones(1))
"""

_STUCK = """\
barrier()
with open({out!r} + str(rank), "w") as file:
    file.write(repr(time.monotonic()))
if rank == 0:
    reduce(torch.ones(1))
while True:
    time.sleep(0.01)
"""

_MODEL = """\
model = None
if rank == 0:
    ones = [torch.nn.Parameter(torch.ones(4096, 4096)) for _ in range({num_layers})]
    model = torch.nn.ParameterList(ones)
    with open({out!r}, "w") as file:
        file.write(repr(time.monotonic()))
"""

PASS = Text("pass\n")


class Texts:
    """The texts in one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._join = _JOIN[dialect]
        self._kind: Kind = "ddp" if dialect == "torch" else "horovod"

    def collective(self, out: Path) -> Text:
        """Return the shortest text with a collective; each rank notes its time beside `out`."""
        note = _NOTE.format(out=str(out))
        return Text(collective(out=out) if self._kind == "ddp" else self._join + _REDUCE + note)

    def first_step(self, out: Path, lr: float) -> Text:
        """Return a training up to its first step."""
        return Text(first_step(out=out, lr=lr, kind=self._kind), is_training=True)

    def training(self, out: Path, turns: tuple[Path, Path], num_blocks: int) -> Text:
        """Return a training in blocks, in turns with others."""
        code = training(self._kind, num_blocks=num_blocks, block_steps=_STEPS, out=out, turns=turns)
        return Text(code, is_training=True)

    def lines(self, out: Path) -> Text:
        """Return a text in which each rank prints `NUM_LINES` lines; it notes when it begins."""
        return Text(self._join + _NOTE.format(out=str(out)) + _LINES)

    def failing(self, out: Path) -> Text:
        """Return a text in which rank 1 raises and rank 0 waits for it in a collective."""
        half = len(ERROR) // 2
        return Text(
            self._join + _FAIL.format(out=str(out), first=ERROR[:half], second=ERROR[half:])
        )

    def endless(self, out: Path) -> Text:
        """Return a training that only a stop ends."""
        return Text(endless(out=out, kind=self._kind), is_training=True)

    def stuck(self, out: Path) -> Text:
        """Return a text in which rank 0 waits in a collective that rank 1 never calls."""
        return Text(self._join + _STUCK.format(out=str(out)))

    def keep(self) -> Text:
        """Return a text that leaves something behind on the ranks."""
        return Text(self._join + _KEEP)

    def is_kept(self, out: Path) -> Text:
        """Return a text that fails unless it is there, and that needs a collective."""
        return Text(self._join + _IS_KEPT + _REDUCE + _NOTE.format(out=str(out)))

    def model(self, out: Path, num_layers: int) -> Text:
        """Return a text that makes `model`, of 64 MiB a layer, on rank 0."""
        return Text(self._join + _MODEL.format(out=str(out), num_layers=num_layers))


def last_lines() -> list[str]:
    """Return what is shown last of each rank, by `Texts.lines`."""
    return [f"line {NUM_LINES - 1} of rank {rank}" for rank in (0, 1)]
