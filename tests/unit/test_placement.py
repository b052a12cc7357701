"""Which rank gets which device."""

import pytest

from dtkit.cluster.placement import gpu_indices, place_local
from dtkit.errors import InvalidInputError


def test_one_rank_per_gpu_by_default() -> None:
    slots = place_local(None, None, gpus=["0", "1", "3"], num_cores=8)
    assert [slot.gpu for slot in slots] == ["0", "1", "3"]
    assert [slot.rank for slot in slots] == [0, 1, 2]
    assert {slot.device for slot in slots} == {"cuda:0"}
    assert not any(slot.shares_gpu for slot in slots)


@pytest.mark.parametrize(("num_cores", "num_ranks"), [(1, 1), (2, 2), (64, 4)])
def test_without_a_gpu_one_rank_per_core_up_to_four(num_cores: int, num_ranks: int) -> None:
    slots = place_local(None, None, gpus=[], num_cores=num_cores)
    assert len(slots) == num_ranks
    assert {slot.device for slot in slots} == {"cpu"}
    assert slots[0].num_threads == max(1, num_cores // num_ranks)


def test_chosen_devices_in_the_order_given() -> None:
    slots = place_local(None, "2,0", gpus=["0", "1", "2"], num_cores=8)
    assert [slot.gpu for slot in slots] == ["2", "0"]
    assert place_local(3, "cpu", gpus=["0"], num_cores=8)[2].device == "cpu"


def test_ranks_share_a_gpu_only_when_asked() -> None:
    with pytest.raises(InvalidInputError, match="--oversubscribe"):
        place_local(2, None, gpus=["0"], num_cores=8)
    slots = place_local(2, None, gpus=["0"], num_cores=8, oversubscribe=True)
    assert [slot.gpu for slot in slots] == ["0", "0"]
    assert all(slot.shares_gpu for slot in slots)


@pytest.mark.parametrize(
    ("num_ranks", "devices", "fix"),
    [(0, None, "-n 2"), (-1, None, "-n 2"), (None, "7", "GPUs 0, 1"), (None, "0,0", "twice"),
     (None, "gpu", "--devices cpu")],
)  # fmt: skip
def test_what_cannot_be_placed_names_the_fix(
    num_ranks: int | None, devices: str | None, fix: str
) -> None:
    with pytest.raises(InvalidInputError, match=fix):
        place_local(num_ranks, devices, gpus=["0", "1"], num_cores=2)


def test_cuda_visible_devices_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpu_indices() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_indices() == []
