"""What it takes to bring a gigabyte of parameters to the notebook, against ipyparallel's pull.

Whole from one rank, and sharded from all of them, which ipyparallel cannot put together.
"""

from __future__ import annotations

import json

from benchmarks.noop import CONNECT, START
from benchmarks.processes import Notebook
from benchmarks.result import Result, Settings, Spread, paired, typical

__all__ = ["pulling"]

_MODEL = """\
%%dist
import dtkit
from torch import nn
def make():
    return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range({num_layers})])
model, sharded = make(), dtkit.shard(make())
"""
_ROUNDS = """\
import ctypes, gc, pathlib, torch
def peak_bytes():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))
def measure(pull):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last pull has freed would hide this one's memory
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before, begun = peak_bytes(), time.perf_counter()
    value = pull()
    took = time.perf_counter() - begun
    size = sum(p.nbytes for p in value.parameters())
    return took, (peak_bytes() - before) / size
measure(lambda: session.pull("model").value)  # torch is loaded
rows = []
for _ in range({num_rounds}):
    rows.append((measure(lambda: session.pull("model").value),
                 measure(lambda: session.pull("sharded").value),
                 measure(lambda: client[0].pull("model", block=True))))
pathlib.Path({out!r}).write_text(json.dumps(rows))
"""


def pulling(settings: Settings) -> list[Result]:
    """Measure both in turn, in one kernel and from the same engine."""
    num_rounds, num_layers = settings.pick(5, 2), settings.pick(16, 4)
    folder = settings.folder / "pull"
    folder.mkdir()
    out = folder / "pull.json"
    with Notebook(folder) as notebook:
        notebook.run(START)
        notebook.run(CONNECT)
        notebook.run(_MODEL.format(num_layers=num_layers))
        notebook.run(_ROUNDS.format(num_rounds=num_rounds, out=str(out)))
        notebook.run("client.close()")
    (our_s, our_peaks), (parts_s, parts_peaks), (their_s, their_peaks) = (
        list(zip(*rows, strict=True)) for rows in zip(*json.loads(out.read_text()), strict=True)
    )
    size = f"{num_layers / 16:g} GiB of parameters"
    command = "ipyparallel.Client(...)[0].pull('model', block=True), same engine"
    held_back_by = "the speed at which two processes copy through a socket"
    return [
        Result(
            name="pull", what=f"%dist_pull of {size}: how much faster",
            spread=paired(their_s, our_s), unit="×", goal=3.0, better="more",
            num_steps=num_rounds, command=command, held_back_by=held_back_by,
            details={"dtkit": typical(our_s, "s"), "ipyparallel": typical(their_s, "s")},
        ),
        Result(
            name="pull_peak", what=f"the driver's peak memory for {size}, over their size",
            spread=Spread.of(our_peaks), unit="×", goal=1.3,
            num_steps=num_rounds, command=command, held_back_by="buffers of the socket",
            details={"ipyparallel": typical(their_peaks, "×")},
        ),
        Result(
            name="pull_sharded", what=f"%dist_pull of {size}, half of them on each of two ranks",
            spread=paired(their_s, parts_s), unit="×", goal=3.0, better="more",
            num_steps=num_rounds, command=f"{command}, where they are whole",
            held_back_by=held_back_by, details={"dtkit": typical(parts_s, "s")},
        ),
        Result(
            name="pull_sharded_peak", what="the driver's peak memory for that, over their size",
            spread=Spread.of(parts_peaks), unit="×", goal=1.3,
            num_steps=num_rounds, command=command, held_back_by="buffers of the socket",
        ),
    ]  # fmt: skip
