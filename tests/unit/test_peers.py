"""What a check says of GPUs that cannot read each other's memory, on hosts that this one lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dtkit.cluster.remote.facts import HostFacts
from dtkit.cluster.remote.peers import pairs_without_access
from dtkit.cluster.remote.preflight import without_peer_access

if TYPE_CHECKING:
    from pathlib import Path

TORCH = """
class cuda:
    def device_count():
        return {num_gpus}
    def can_device_access_peer(a, b):
        {told}
"""


@pytest.fixture
def torch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put another torch in the place of the real one, for processes that are started."""

    def say(num_gpus: int, told: str) -> None:
        (tmp_path / "torch.py").write_text(TORCH.format(num_gpus=num_gpus, told=told))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return say


class Agents:
    """Agents of hosts, as a check asks them."""

    def __init__(self, answers: dict[int, dict[str, Any]]) -> None:
        self.answers = answers
        self.asked: list[int] = []

    def control(self, operation: str, *, ranks: list[int], timeout_s: float) -> dict[int, Any]:
        """Return the answers of those that were asked and have one."""
        assert operation == "peers"
        assert timeout_s > 60.0  # torch is loaded for it
        self.asked += ranks
        return {number: self.answers[number] for number in ranks if number in self.answers}


def host(*gpus: str) -> HostFacts:
    return HostFacts(
        host="h", interface="lo", address="127.0.0.1", gpus=gpus, num_cores=8, versions={},
        code="", shared_memory_bytes=1 << 34, unix_s=0.0, has_folder=True, folder="",
    )  # fmt: skip


def test_torch_is_asked_for_each_pair_both_ways(torch_says: Any) -> None:
    torch_says(3, "return (a, b) != (2, 0)")
    assert pairs_without_access() == [(0, 2)]
    torch_says(4, "return True")
    assert pairs_without_access() == []


def test_a_torch_that_cannot_be_asked_gives_its_reason(torch_says: Any) -> None:
    torch_says(2, "raise RuntimeError('CUDA driver version is insufficient')")
    with pytest.raises(OSError, match="RuntimeError: CUDA driver version is insufficient"):
        pairs_without_access()


def test_pairs_are_told_by_host_as_its_tools_number_them() -> None:
    agents = Agents({1: {"pairs": [(0, 1), (0, 2)]}, 2: {"pairs": []}, 3: {"error": "no CUDA"}})
    hosts = [host("0"), host("4", "5", "7"), host("0", "1"), host("0", "1"), host("0", "1")]
    names = ["alpha", "beta", "gamma", "delta", "epsilon"]
    found = without_peer_access(agents, hosts, names)  # type: ignore[arg-type]  # a fake
    assert agents.asked == [1, 2, 3, 4]  # one GPU has no peer
    first, *others = found
    assert first == (
        "beta: GPUs 4 and 5, 4 and 7 have no peer access, so NCCL copies between them through the "
        "host's memory; `nvidia-smi topo -m` shows how they are connected"
    )
    assert others == [
        "delta: GPU peer access is not known: no CUDA",
        "epsilon: GPU peer access is not known: its agent does not answer",
    ]
