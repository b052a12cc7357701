"""torch's profiler on this rank, for a few steps after warm-up: the same steps on every rank."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dtkit.engine.parts import Part
from dtkit.engine.trace.clock import measure_offset
from dtkit.trace.profiles import profile_path

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]

_WARM_UP_STEPS = 5
"""Before the first that is profiled: they load, compile, and lay out the buckets."""
_MAX_OPERATORS = 100


class Profile(Part):
    """Profiles steps 7 to 6 + `num_steps`: five of warm-up and one in which the profiler starts.

    Args:
        run: the run.
        num_steps: how many are profiled.
    """

    def __init__(self, run: ActiveRun, *, num_steps: int) -> None:
        self._run = run
        self._num_steps = num_steps
        self._shift_ns = 0
        self._profile: Any = None  # torch's profiler is annotated in part

    def begin(self) -> None:
        """Compare the clocks, and set the profiler to wait."""
        run = self._run
        offset_ns = measure_offset(run.rank, run.ranks).offset_ns if len(run.ranks) > 1 else 0
        # The profiler's times are those of the host's wall clock; the ranks are
        # compared by their monotonic clocks.
        self._shift_ns = offset_ns - (time.time_ns() - time.perf_counter_ns())
        # Two lines of its own on stderr for each profile; read at its first use.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=_WARM_UP_STEPS, warmup=1, active=self._num_steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Let the profiler go on to the next step."""
        self._profile.step()

    def end(self, state: str) -> None:  # noqa: ARG002  a Part's signature
        """End the profiler; a run that was too short leaves what there is."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profiler: Any) -> None:
        run = self._run
        path = profile_path(run.dir, run.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        profiler.export_chrome_trace(str(temporary))
        about = {
            "rank": run.rank,
            "device": str(run.device),
            "shift_ns": self._shift_ns,
            "num_steps": self._num_steps,
            "operators": _operators(profiler),
        }
        path.with_suffix(".about.json").write_text(json.dumps(about))
        temporary.replace(path)


def _operators(profiler: Any) -> list[list[Any]]:
    """Return name, calls, and milliseconds of its own on host and device, longest first."""
    rows = [
        [
            event.key,
            event.count,
            event.self_cpu_time_total / 1000,
            event.self_device_time_total / 1000,
        ]
        for event in profiler.key_averages()
        if not event.key.startswith("ProfilerStep")
    ]
    return sorted(rows, key=lambda row: -(row[2] + row[3]))[:_MAX_OPERATORS]


def make(run: ActiveRun, *, num_steps: int) -> Part:
    """Return the part for a run."""
    return Profile(run, num_steps=num_steps)
