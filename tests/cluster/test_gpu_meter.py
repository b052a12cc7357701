"""How busy a GPU is: from NVML, here a module of its interface, and a real one where there is."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dtkit.engine import meter
from dtkit.engine.recorder import Recorder
from dtkit.events import GpuUse
from dtkit.telemetry import RunState

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.events import Event

GIB = 2**30


class FakeNvml(ModuleType):
    """nvidia-ml-py's module with one device, which is not the one that CUDA calls 0."""

    class NVMLError(Exception):
        """As nvidia-ml-py raises them."""

    def __init__(self, *, fails: str = "") -> None:
        super().__init__("pynvml")
        self.fails = fails
        self.num_open = 0

    def _may(self, name: str) -> None:
        if name in self.fails:
            raise self.NVMLError

    def nvmlInit(self) -> None:  # noqa: N802  NVML's names, here and below
        self._may("init")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._may("uuid")
        if uuid != "GPU-1234":
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        assert handle == "handle"
        self._may("memory")
        return SimpleNamespace(used=6 * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        assert handle == "handle"
        self._may("busy")
        return SimpleNamespace(gpu=87, memory=40)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that this machine lacks, as far as a recorder looks at it."""
    for name, found in (
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 5 * GIB),
        ("get_device_properties", SimpleNamespace(uuid="1234")),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _device, found=found: found)
    monkeypatch.setattr(meter, "_GPU_INTERVAL_S", 0.0)
    return torch.device("cuda", 0)


def recorded(device: torch.device, folder: Path) -> list[GpuUse]:
    sent: list[Event] = []
    recorder = Recorder(3, device, 0.0, folder / "rank-3.jsonl", sent.extend)
    recorder.start()
    recorder.num_steps += 1
    recorder.stepped(0.1)
    recorder.close()
    return [event for event in sent if isinstance(event, GpuUse)]


def test_a_recorder_tells_how_busy_the_gpu_is(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    use = recorded(cuda, tmp_path)[-1]
    assert (use.rank, use.step, use.busy_percent) == (3, 1, 87.0)
    assert (use.used_bytes, use.total_bytes) == (6 * GIB, 80 * GIB)
    assert nvml.num_open == 0


@pytest.mark.parametrize("fails", ["init", "uuid", "memory"])
def test_where_nvml_does_not_answer_nothing_is_told(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    nvml = FakeNvml(fails=fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert recorded(cuda, tmp_path) == []
    assert nvml.num_open == 0


def test_without_the_module_nothing_is_told(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert recorded(cuda, tmp_path) == []


def test_a_part_of_a_gpu_has_memory_alone(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(fails="busy"))
    use = recorded(cuda, tmp_path)[-1]
    assert math.isnan(use.busy_percent)
    assert use.used_bytes == 6 * GIB
    state = RunState("run", [3])
    state.handle(use)
    assert "GPU memory GiB" in state.curves()
    assert "GPU busy %" not in state.curves()


@pytest.mark.gpu
def test_the_real_nvml_knows_the_device(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    uses = recorded(torch.device("cuda", 0), tmp_path)
    assert uses
    assert 0 < uses[-1].used_bytes <= uses[-1].total_bytes
