"""Meter: memory of this process, and what NVML says of its GPU; read by a thread, not by steps."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GpuReading", "Meter"]

_GPU_INTERVAL_S = 1.0
"""NVML's own figure is the mean of the last sixth of a second to second; source: nvml.h."""


class GpuReading(NamedTuple):
    """A GPU as all processes on it use it."""

    busy_percent: float
    """Part of the time in which a kernel ran."""
    used_bytes: float
    total_bytes: float


class Meter:
    """Measures the memory of a rank, and its GPU where NVML is there (`pip install nvidia-ml-py`).

    Args:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._gpu: _Gpu | None = None
        self._next_s = math.inf
        self.peak_bytes: int = 0
        """High-water mark of device memory (CUDA) or resident memory (CPU) so far."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._next_s = 0.0  # looked for by the thread: loading NVML takes its time

    def sample_memory(self) -> None:
        """Take the memory in."""
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device)
        else:
            now = self._process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, now)

    def sample_gpu(self) -> GpuReading | None:
        """Return what NVML says, once a second; None: it is not yet time, or there is none."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return None
        if self._gpu is None:
            self._gpu = find_gpu(self._device)
        reading = None if self._gpu is None else self._gpu.read()
        self._next_s = math.inf if reading is None else now_s + _GPU_INTERVAL_S
        return reading

    def close(self) -> None:
        """Let go of NVML."""
        self._next_s = math.inf
        if self._gpu is not None:
            self._gpu.close()


class _Gpu:
    """One device of NVML, which is open.

    Args:
        nvml: the module `pynvml` of nvidia-ml-py.
        handle: its device.
    """

    def __init__(self, nvml: ModuleType, handle: Any) -> None:  # Any: NVML's own
        self._nvml, self._handle = nvml, handle

    def read(self) -> GpuReading | None:
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError:  # the GPU fell off the bus: training will say so
            return None
        try:
            busy = float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._nvml.NVMLError:  # a part of a GPU (MIG) has no such figure
            busy = math.nan
        return GpuReading(busy, float(memory.used), float(memory.total))

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def find_gpu(device: torch.device) -> _Gpu | None:
    """Return a CUDA device as NVML knows it; None: NVML, its module or the device is not there.

    By its UUID: CUDA_VISIBLE_DEVICES counts anew, NVML does not.
    """
    try:
        import pynvml  # optional: nvidia-ml-py
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("GPU", "MIG"):
        with suppress(pynvml.NVMLError):
            return _Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}"))
    pynvml.nvmlShutdown()
    return None
