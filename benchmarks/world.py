"""Large worlds: what many ranks cost the notebook's process, and how long they take to begin."""

from __future__ import annotations

from functools import partial
from statistics import median

from benchmarks.driver import measure_cpu
from benchmarks.processes import Notebook
from benchmarks.result import Result, Settings, Spread, number

__all__ = ["group_formation", "output_of_many", "world_cpu"]

_NUM_RANKS = 64
_STEPS_PER_S = 100
_BRIEF = f'simulate = {{"steps_per_s": {_STEPS_PER_S}, "seconds": 3}}'
_START = """%load_ext dtkit
from pathlib import Path
from benchmarks.simulated import simulated_session
session = simulated_session({num_ranks}, Path("runs"))
"""
_OUTPUT = """
import time
from dtkit.driver.waiting import drive
output, requests, steps = session.running({cell!r})
begun_s, cpu_s = time.monotonic(), time.process_time()
num_drawn = 0
for _ in steps:
    if time.monotonic() - begun_s > 0.5 * num_drawn:  # as a dashboard does
        output.blocks()
        num_drawn += 1
    requests.alarm.wait(0.05)
blocks = output.blocks()
Path({out!r}).write_text(f"{{time.process_time() - cpu_s}} {{len(blocks)}}")
"""
_NUM_LINES = 10_000
_SESSION = """
import time
from pathlib import Path
import dtkit
session = dtkit.Session.start({num_ranks}, devices="cpu")
times = []
for _ in range({num_rounds}):
    begun_s = time.monotonic()
    session.reset_group()
    times.append(time.monotonic() - begun_s)
Path({out!r}).write_text(f"{{session.start_s}} {{sorted(times)[len(times) // 2]}}")
session.close()
"""


def world_cpu(settings: Settings) -> list[Result]:
    """Measure the CPU time of the kernel while it shows a run of 64 simulated ranks."""
    folder = settings.folder / "world"
    folder.mkdir()
    seconds = settings.pick(25, 8)
    shares: dict[str, list[float]] = {"live": [], "widgets": [], "off": []}
    cell = f'simulate = {{"steps_per_s": {_STEPS_PER_S}, "seconds": {seconds}}}'
    with Notebook(folder) as notebook:
        notebook.run(_START.format(num_ranks=_NUM_RANKS))
        for ui in shares:  # what is loaded once is not what it costs
            notebook.run(f"os.environ['DTKIT_UI'] = {ui!r}")
            notebook.run(f"%%dist_train\n{_BRIEF}")
        for _ in range(settings.pick(2, 1)):
            for ui, taken in shares.items():
                notebook.run(f"os.environ['DTKIT_UI'] = {ui!r}")
                taken.append(measure_cpu(notebook, f"%%dist_train\n{cell}").share)
    spread = Spread.of(shares["live"])
    return [
        Result(
            name="world_cpu",
            what=f"CPU time of the kernel's whole process while {_NUM_RANKS} ranks make "
            f"{_STEPS_PER_S} steps a second each, in percent of one core",
            spread=spread, unit="%", goal=5.0,
            num_steps=len(shares["live"]) * seconds * _STEPS_PER_S,
            command="the same run with other dashboards, in turn; engines are simulated",
            held_back_by="the rest is drawing: 64 ranks' own steps and their table, twice a second",
            details={
                f"with DTKIT_UI={ui}": f"{Spread.of(taken)} %"
                for ui, taken in shares.items() if ui != "live"
            },
        )
    ]  # fmt: skip


def output_of_many(settings: Settings) -> list[Result]:
    """Measure what the text of many ranks costs: 10,000 lines each, equal ones merged."""
    folder = settings.folder / "output"
    folder.mkdir()
    per_line: dict[int, float] = {}
    for num_ranks in (8, 16, 32, 64):
        cell = f'simulate = {{"num_lines": {_NUM_LINES}, "is_alike": {False}}}'
        out = folder / "cpu"
        with Notebook(folder) as notebook:
            notebook.run(_START.format(num_ranks=num_ranks))
            taken = []
            for _ in range(settings.pick(3, 1)):
                notebook.run(_OUTPUT.format(cell=cell, out=str(out)))
                cpu_s, _ = out.read_text().split()
                taken.append(1e6 * float(cpu_s) / (num_ranks * _NUM_LINES))
            per_line[num_ranks] = median(taken)
    return [
        Result(
            name="output",
            what=f"CPU time per line that 64 ranks print ({_NUM_LINES:,} each) / per line of 8",
            spread=Spread.of([per_line[64] / per_line[8]]), unit="×", goal=1.25,
            num_steps=64 * _NUM_LINES,
            command="the same cell on 8 simulated ranks",
            held_back_by="putting all ranks' text together anew for each drawing",
            details={f"{n} ranks": f"{number(us)} µs a line" for n, us in per_line.items()},
        )
    ]  # fmt: skip


def group_formation(settings: Settings) -> list[Result]:
    """Measure how long real engines take to begin, and their process group to be formed."""
    folder = settings.folder / "group"
    folder.mkdir()
    num_rounds = settings.pick(5, 2)
    starts: dict[int, float] = {}
    groups: dict[int, float] = {}
    for num_ranks in (2, 4, 8, 16):
        out = folder / "times"
        with Notebook(folder) as notebook:
            notebook.run(_SESSION.format(num_ranks=num_ranks, num_rounds=num_rounds, out=str(out)))
        starts[num_ranks], groups[num_ranks] = map(float, out.read_text().split())
    describe = partial("{:.2f} s until all are there, {:.0f} ms to form the group anew".format)
    return [
        Result(
            name="group",
            what="forming a process group of 16 real engines anew, per rank / of 4, per rank",
            spread=Spread.of([groups[16] / groups[4] / 4]), unit="×", goal=1.5,
            num_steps=num_rounds,
            command="the same with 4 ranks, on the same cores",
            held_back_by="each rank connects to each other one: gloo's full mesh",
            details={f"{n} ranks": describe(starts[n], 1000 * groups[n]) for n in starts},
        )
    ]  # fmt: skip
