"""What the dashboard costs the notebook's own process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from benchmarks.cells import training
from benchmarks.processes import Notebook
from benchmarks.result import Result, Settings, Spread, number

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Cpu", "dashboard_cpu", "measure_cpu"]

_START = "%load_ext dtkit\n%dist_init -n 2 --devices cpu"
_BLOCK_STEPS = 100
_SETTLE_S = 2.0
_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time of the kernel: percent of a core once the run goes on, and seconds for the rest."""

    share: float
    ends_s: float


def dashboard_cpu(settings: Settings) -> list[Result]:
    """Measure the CPU time of the kernel while it shows a run, and while it shows none."""
    folder = settings.folder / "driver"
    folder.mkdir()
    run_s = settings.pick(25, 8)
    taken: dict[str, list[Cpu]] = {"widgets": [], "off": []}
    with Notebook(folder) as notebook:
        notebook.run(_START)
        num_blocks = _blocks_in(notebook, folder / "times.json", run_s)
        for ui in settings.pick(2, 1) * ("widgets", "off"):
            notebook.run(f"os.environ['DTKIT_UI'] = {ui!r}")
            cell = _cell(folder / "times.json", num_blocks)
            taken[ui].append(measure_cpu(notebook, cell))
    shown, hidden = (Spread.of([cpu.share for cpu in taken[ui]]) for ui in ("widgets", "off"))
    return [
        Result(
            name="dashboard_cpu",
            what="CPU time of the kernel's whole process while a run goes on under the dashboard, "
            "in percent of one core",
            spread=shown,
            unit="%",
            goal=5.0,
            num_steps=len(taken["widgets"]) * num_blocks * _BLOCK_STEPS,
            command="the same run with DTKIT_UI=off, in turn",
            held_back_by="drawing of the chart; reading the ranks' messages is the rest",
            details={
                "with DTKIT_UI=off": f"{hidden} %",
                "so the dashboard by itself": f"{number(shown.median - hidden.median)} %",
                "first and last picture, once a run": _ends(taken["widgets"]),
                "the same with DTKIT_UI=off": _ends(taken["off"]),
            },
        )
    ]


def _ends(taken: Sequence[Cpu]) -> str:
    return f"{Spread.of([cpu.ends_s for cpu in taken])} s of CPU time"


def _blocks_in(notebook: Notebook, out: Path, seconds: float) -> int:
    """Return how many blocks take about so long; the run that finds out warms everything up."""
    begun_s = time.monotonic()
    notebook.run(_cell(out, 1))
    return max(1, round(seconds / (time.monotonic() - begun_s)))


def measure_cpu(notebook: Notebook, cell: str) -> Cpu:
    """Run a cell, and look at the kernel's CPU clock between its first and its last seconds."""
    process = psutil.Process(notebook.pid)
    begun_s = _cpu_s(process)
    notebook.begin(cell)
    time.sleep(_SETTLE_S)
    samples = [(time.monotonic(), _cpu_s(process))]
    while not notebook.has_ended():
        time.sleep(_SAMPLE_S)
        samples.append((time.monotonic(), _cpu_s(process)))
    notebook.wait()
    # The last second holds the final picture.
    (t0, c0), (t1, c1) = samples[0], samples[-1 - round(1 / _SAMPLE_S)]
    share = (c1 - c0) / (t1 - t0)
    whole_s = samples[-1][0] - samples[0][0] + _SETTLE_S
    ends_s = _cpu_s(process) - begun_s - share * whole_s
    return Cpu(100.0 * share, ends_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _cell(out: Path, num_blocks: int) -> str:
    return "%%dist_train\n" + training(
        "ddp", num_blocks=num_blocks, block_steps=_BLOCK_STEPS, out=out
    )
