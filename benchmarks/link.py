"""Training over a slow link: each method of `--compress` against DDP in float32."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.processes import BenchmarkError, environment
from benchmarks.result import Result, Settings, Spread, number
from testbed.network import Network, why_no_network

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["over_a_slow_link"]

GOALS = {"fp16": 1.9, "int8": 3.5, "topk:0.01": 10.0, "powersgd:4": 10.0}
"""At 100 Mbit/s, times the samples per second of DDP in float32."""
MORE = ("none", "bf16", "int4", "sign")
"""Measured along, without a goal."""
NUM_HOSTS = 2
TIMEOUT_S = 300


def over_a_slow_link(settings: Settings) -> list[Result]:
    """Train the same model on two hosts, a process each, with their links made slow.

    Raises:
        BenchmarkError: there can be no such hosts here.
    """
    reason = why_no_network(is_limited=True)
    if reason:
        raise BenchmarkError(reason)
    methods = ["ddp", *GOALS, *(() if settings.is_quick else MORE)]
    with Network(NUM_HOSTS) as network:
        found = {method: _train(method, network, settings) for method in methods}
    ddp = found.pop("ddp")
    million = ddp["num_params"] / 1e6
    results = []
    for method, facts in found.items():
        times_s, base_s = facts["times_s"], ddp["times_s"]
        slow, fast = (_faster(base_s[rate], times_s[rate]) for rate in ("100", "1000"))
        results.append(
            Result(
                name=f"link {method}",
                what=(
                    f"samples/s with --compress {method} / with DDP in float32, over 100 Mbit/s, "
                    f"{million:.1f} M parameters, {NUM_HOSTS} ranks"
                ),
                spread=slow, unit="×", goal=GOALS.get(method, 1.0), better="more",
                num_steps=len(times_s["100"]),
                command="DistributedDataParallel in two processes on two network namespaces (tbf)",
                held_back_by="the CPU time of computing and compressing, which no link shortens",
                details={
                    "at 100 Mbit/s": _speeds(ddp, facts, "100"),
                    "at 1 Gbit/s": f"{fast} ×: {_speeds(ddp, facts, '1000')}",
                    "compressing": f"{number(facts['cpu_ms_per_mb'])} ms of CPU time per MB",
                },
            )
        )  # fmt: skip
    return results


def _train(method: str, network: Network, settings: Settings) -> dict[str, Any]:
    folder = settings.folder / method.replace(":", "-")
    folder.mkdir()
    out = folder / "out.json"
    words = [sys.executable, "-m", "benchmarks.link_worker", method, str(out)]
    words += ["--quick"] if settings.is_quick else []
    paths = os.pathsep.join([str(Path.cwd()), *sys.path])
    network.limit(None)
    try:
        network.run(words, folder, {**environment(), "PYTHONPATH": paths}, TIMEOUT_S)
    except RuntimeError as error:
        raise BenchmarkError(str(error)) from error
    facts: dict[str, Any] = json.loads(out.read_text())
    return facts


def _faster(base_s: list[float], times_s: list[float]) -> Spread:
    """Return how many times faster: to the median of the other, which ran at another time."""
    base = median(base_s)
    return Spread.of([base / seconds for seconds in times_s])


def _speeds(ddp: Mapping[str, Any], facts: Mapping[str, Any], rate: str) -> str:
    before, after = (f["samples"] / median(f["times_s"][rate]) for f in (ddp, facts))
    return f"{number(after)} samples/s, DDP {number(before)}"
