"""Run the benchmarks: `python -m benchmarks [--only NAME] [--quick]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.carrying import pulling
from benchmarks.driver import dashboard_cpu
from benchmarks.horovod import against_horovod
from benchmarks.link import over_a_slow_link
from benchmarks.noop import noop
from benchmarks.processes import BenchmarkError
from benchmarks.recording import recording
from benchmarks.release import release
from benchmarks.result import Result, Settings, table, write_json
from benchmarks.start import first_collective, rerun
from benchmarks.step_time import against_ddp, against_torchrun, with_profiler, with_timeline
from benchmarks.straggler import straggler
from benchmarks.traces import merging
from benchmarks.world import group_formation, output_of_many, world_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BENCHMARKS: dict[str, Callable[[Settings], list[Result]]] = {
    "step": against_torchrun,
    "plain": against_ddp,
    "start": first_collective,
    "rerun": rerun,
    "noop": noop,
    "recording": recording,
    "dashboard_cpu": dashboard_cpu,
    "timeline": with_timeline,
    "profiler": with_profiler,
    "merge": merging,
    "release": release,
    "pull": pulling,
    "link": over_a_slow_link,
    "straggler": straggler,
    "world_cpu": world_cpu,
    "output": output_of_many,
    "group": group_formation,
}
"""By the name that `--only` takes, in the order in which they run."""
ON_REQUEST: dict[str, Callable[[Settings], list[Result]]] = {"horovod": against_horovod}
"""Needs what `pip` alone does not install; `--only` takes it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file.

    Returns:
        0 also when a goal is missed; 1 when a benchmark did not run.
    """
    args = _parse(argv)
    names = args.only or list(BENCHMARKS)
    begun_s = time.monotonic()
    results: list[Result] = []
    failures: list[str] = []
    for name in names:
        _progress(f"{name} …")
        with tempfile.TemporaryDirectory(prefix="dtkit-bench-") as folder:
            try:
                results += (BENCHMARKS | ON_REQUEST)[name](Settings(args.quick, Path(folder)))
            except BenchmarkError as error:
                failures.append(f"{name} did not run: {error}")
    _progress("")
    facts = {**machine(), "took_s": round(time.monotonic() - begun_s)}
    write_json(args.output, facts, results)
    print(table(results))
    print("\n".join(["", *failures]), end="")
    print(f"\n{heading(facts)}\nwritten to {args.output}")
    return 1 if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=[*BENCHMARKS, *ON_REQUEST], metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS | ON_REQUEST)}; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: to see that it runs, not to be quoted"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    return parser.parse_args(argv)


def machine(module: str = "benchmarks") -> dict[str, object]:
    """Return what the figures depend on."""
    names = ("torch", "ipyparallel", "ipykernel", "ipywidgets", "matplotlib")
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def heading(facts: dict[str, object]) -> str:
    """Return machine and versions in one line."""
    return (
        f"{facts['cpu']}, {facts['num_cores']} cores, load {facts['load_1min']}; "
        f"Python {facts['python']}, torch {facts['torch']}, ipyparallel {facts['ipyparallel']}; "
        f"{facts['time']}, {facts['took_s']} s"
    )


def _progress(text: str) -> None:
    """Say on a terminal what is being measured, on a line that goes away again."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
