"""The texts that are run: the same loop for a script and for a notebook's cell.

Nothing here imports torch. Each text is complete: a cell, or a script for torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BATCH",
    "MODELS",
    "NUM_RANKS",
    "USUAL",
    "Kind",
    "Model",
    "collective",
    "endless",
    "first_step",
    "recorded_block",
    "training",
]

Kind = Literal["ddp", "plain", "horovod", "barrier"]
"""How a loop is written: with DDP, for one device, with Horovod's interface, or that with a barrier
in each step in place of what averages gradients: no training in step can be quicker."""
NUM_RANKS = 2
BATCH = 12
"""Of each rank: a step of 15 to 30 ms on a current CPU core, but of 1 ms with the dense model."""

_SETUP = """\
import json, os, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

torch.set_num_threads(1)
torch.manual_seed(0)
images = torch.randn({num_images}, {shape})
data = TensorDataset(images, torch.randint(10, ({num_images},)))
model = nn.Sequential(
{layers}\
)
"""


@dataclass(frozen=True, slots=True)
class Model:
    """What is trained: a sequence of layers, for inputs of a shape.

    Attributes:
        shape: of an input, as written in Python.
        layers: the arguments of `nn.Sequential`.
        num_steps: how many are timed in a row: for about half a second.
    """

    shape: str
    layers: str
    num_steps: int


def _convolutional(width: int) -> Model:
    """Return a model with 22,000 + 1,035 × width parameters."""
    return Model(
        "3, 32, 32",
        f"""\
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(4),
    nn.Flatten(), nn.Linear(1024, {width}), nn.ReLU(), nn.Linear({width}, 10),
""",
        num_steps=40,
    )


def _dense(width: int) -> Model:
    """Return a model whose step is hardly more than what its gradients' way takes."""
    return Model(
        "64",
        f"""\
    nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU(),
    nn.Linear({width}, 10),
""",
        num_steps=200,
    )


USUAL = _convolutional(256)
MODELS = {
    "0.09 M (dense)": _dense(256),
    "0.29 M": USUAL,
    "5.2 M": _convolutional(5000),
}
"""By their number of parameters."""

_JOIN = """\
if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, barrier = dist.get_rank(), dist.barrier
"""

_HOROVOD = """\
import horovod.torch as hvd

hvd.init()
rank, barrier = hvd.rank(), hvd.barrier
sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=rank, shuffle=True)
loader = DataLoader(data, batch_size={batch}, sampler=sampler)
optimizer = torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9)
"""

_AVERAGING = """\
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
"""

_WAITING = """\
optimizer.register_step_pre_hook(lambda *_: dist.barrier())
"""

_DDP = """\
model = DistributedDataParallel(model)
loader = DataLoader(data, batch_size={batch}, sampler=DistributedSampler(data, shuffle=True))
"""

_PLAIN = """\
loader = DataLoader(data, batch_size={batch}, shuffle=True)
"""

_OPTIMIZER = """\
optimizer = torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9)
"""

_TURNS = """\
if rank == 0:
    done, go = os.open({done!r}, os.O_WRONLY), os.open({go!r}, os.O_RDONLY)

def wait_for_turn():
    if rank == 0:
        os.write(done, b"d")
        os.read(go, 1)
    barrier()
"""

_NO_TURNS = """\
def wait_for_turn():
    pass
"""

_LOOP = """\
times, cpu = [], []
for epoch in range({num_blocks}):
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    block = []
    wait_for_turn()
    cpu_s = time.process_time()
    last = time.perf_counter()
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        now = time.perf_counter()
        block.append(now - last)
        last = now
    times.append(block)
    cpu.append((time.process_time() - cpu_s) / len(block))
wait_for_turn()
if rank == 0:
    with open({out!r}, "w") as file:
        json.dump({{"times_s": times, "cpu_s": cpu, "loss": loss.item()}}, file)
"""

_FIRST_STEP = """\
for x, y in loader:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    break
"""

_ENDLESS = """\
num_epochs = 0
while True:
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    num_epochs += 1
    if num_epochs == 1:
        with open({out!r} + str(rank), "w") as file:
            file.write(repr(time.monotonic()))
"""

_NOTE_TIME = """\
with open({out!r} + str(rank), "w") as file:
    file.write(repr(time.monotonic()))
"""

_COLLECTIVE = """\
import os, time
import torch
import torch.distributed as dist
"""

_ALL_REDUCE = """\
dist.all_reduce(torch.ones(1))
"""

_RECORDED = """\
import json, time
import torch

w = torch.ones(8, requires_grad=True)
optimizer = torch.optim.SGD([w], lr=1e-3)

def train(num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        optimizer.step()

train(200)
times = []
cpu_s, thread_s = time.process_time(), time.thread_time()
for _ in range({num_chunks}):
    begun = time.perf_counter()
    train({chunk})
    times.append(time.perf_counter() - begun)
cpu_s, thread_s = time.process_time() - cpu_s, time.thread_time() - thread_s
with open({out!r}, "w") as file:
    json.dump({{"times_s": times, "cpu_s": cpu_s, "thread_s": thread_s}}, file)
"""


def training(
    kind: Kind,
    *,
    num_blocks: int,
    block_steps: int,
    out: Path,
    turns: tuple[Path, Path] | None = None,
    model: Model = USUAL,
) -> str:
    """Return a loop of `num_blocks` epochs of `block_steps` steps, timed one by one.

    Rank 0 writes to `out`, as JSON: `times_s`, one list per block; `cpu_s`, CPU time of the
    rank per step, one number per block; `loss`, the last one.

    Args:
        kind: how it is written.
        num_blocks: epochs.
        block_steps: steps of each rank in an epoch.
        out: file for the times.
        turns: FIFOs `done` and `go`; before each block and before its end rank 0
            writes to the first and waits for a byte of the second. None runs straight on.
        model: what is trained.
    """
    wait = _NO_TURNS
    if turns is not None:
        wait = _TURNS.format(done=str(turns[0]), go=str(turns[1]))
    return (
        _setup(kind, num_steps=block_steps, model=model)
        + wait
        + _LOOP.format(num_blocks=num_blocks, out=str(out))
    )


def _setup(kind: Kind, *, num_steps: int, lr: float = 0.01, model: Model = USUAL) -> str:
    """Return what makes the model, the loader of `num_steps` batches a rank, and the optimizer."""
    optimizer = _OPTIMIZER.format(lr=lr)
    distributed = {
        "ddp": _JOIN + _DDP.format(batch=BATCH) + optimizer,
        "plain": _JOIN + _PLAIN.format(batch=BATCH) + optimizer,
        "horovod": _HOROVOD.format(batch=BATCH, lr=lr) + _AVERAGING,
        "barrier": _HOROVOD.format(batch=BATCH, lr=lr) + _WAITING,
    }
    num_images = NUM_RANKS * BATCH * num_steps
    setup = _SETUP.format(num_images=num_images, shape=model.shape, layers=model.layers)
    return setup + distributed[kind]


def first_step(*, out: Path, lr: float, kind: Kind = "ddp") -> str:
    """Return a script up to its first step; each rank writes when that was done.

    Args:
        out: prefix of the files; the rank is appended. They hold `time.monotonic()`.
        lr: what was edited.
        kind: how it is written.
    """
    return _setup(kind, num_steps=10, lr=lr) + _FIRST_STEP + _NOTE_TIME.format(out=str(out))


def endless(*, out: Path, kind: Kind = "ddp") -> str:
    """Return a loop that trains until it is stopped; each rank writes when its first epoch ended.

    Args:
        out: see `first_step`.
        kind: how it is written.
    """
    return _setup(kind, num_steps=10) + _ENDLESS.format(out=str(out))


def collective(*, out: Path, init: str = _JOIN) -> str:
    """Return the shortest script with a collective; each rank writes when that was done.

    Args:
        out: prefix of the files; the rank is appended. They hold `time.monotonic()`.
        init: how the group is made; where it exists nothing is done.
    """
    return _COLLECTIVE + init + _ALL_REDUCE + _NOTE_TIME.format(out=str(out))


def recorded_block(*, num_chunks: int, chunk: int, out: Path) -> str:
    """Return a loop of trivial steps of about 0.1 ms; rank 0 writes the seconds of each chunk."""
    return _RECORDED.format(num_chunks=num_chunks, chunk=chunk, out=str(out))
