"""Which DataLoaders are divided among the ranks, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rig import Rig

CELL = """
from torch.utils.data import (
    IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler,
    BatchSampler, DistributedSampler,
)
torch.manual_seed(0)
numbers = TensorDataset(torch.arange(NUM))
loader = LOADER
length = len(loader)
model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
seen = []
for batch in loader:
    (values,) = batch if isinstance(batch, (list, tuple)) else (batch,)
    seen.append(sorted(values.reshape(-1).tolist()))
    optimizer.zero_grad()
    model(values.reshape(-1, 1).float()).mean().backward()
    optimizer.step()
"""


def seen(rig: Rig, loader: str, *, num: int = 20, batch: str = "rank") -> list[list[list[int]]]:
    """Return the batches that each rank got."""
    cell = CELL.replace("LOADER", loader).replace("NUM", str(num))
    rig.last = rig.train(cell, batch=batch)  # type: ignore[attr-defined]
    lengths = rig.values("length")
    batches = rig.values("seen")
    assert lengths == [len(one) for one in batches]
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return sorted(value for batch in batches for value in batch)


def test_a_rank_gets_batches_of_the_written_size(rig2: Rig) -> None:
    first, second = seen(rig2, "DataLoader(numbers, batch_size=4, shuffle=True)")
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert [len(batch) for batch in second] == [4, 4, 2]
    assert sorted(flat(first) + flat(second)) == list(range(20))


def test_a_global_batch_is_split(rig2: Rig) -> None:
    loader = "DataLoader(numbers, batch_size=7, shuffle=True)"
    first, second = seen(rig2, loader, batch="global")
    assert [len(batch) for batch in first] == [4, 4, 3]
    assert [len(batch) for batch in second] == [3, 3, 3]
    assert sorted(flat(first) + flat(second)) == list(range(20))


def test_a_batch_smaller_than_the_number_of_ranks_counts_once(rig2: Rig) -> None:
    loader = "DataLoader(numbers, batch_size=4, shuffle=True)"
    first, second = seen(rig2, loader, num=9, batch="global")
    assert len(first) == len(second) == 3
    assert rig2.last._state.num_samples == 9  # type: ignore[attr-defined]


def test_drop_last_drops_the_incomplete_global_batch(rig2: Rig) -> None:
    first, second = seen(rig2, "DataLoader(numbers, batch_size=4, shuffle=True, drop_last=True)")
    assert [len(batch) for batch in first + second] == [4, 4, 4, 4]
    assert len(set(flat(first) + flat(second))) == 16


@pytest.mark.parametrize("more", ["num_workers=1", "num_workers=1, persistent_workers=True"])
def test_workers_load_the_share_of_their_rank(rig2: Rig, more: str) -> None:
    first, second = seen(rig2, f"DataLoader(numbers, batch_size=5, shuffle=True, {more})")
    assert sorted(flat(first) + flat(second)) == list(range(20))


@pytest.mark.parametrize(
    "sampler",
    ["SubsetRandomSampler(range(10))", "RandomSampler(numbers, num_samples=10)"],
)
def test_random_samplers_are_divided(rig2: Rig, sampler: str) -> None:
    first, second = seen(rig2, f"DataLoader(numbers, batch_size=2, sampler={sampler})")
    assert len(set(flat(first) + flat(second))) == 10


def test_an_order_of_ones_own_generator_is_rank_0s(rig2: Rig) -> None:
    loader = "DataLoader(numbers, batch_size=5, shuffle=True, generator=torch.Generator())"
    first, second = seen(rig2, loader)
    assert sorted(flat(first) + flat(second)) == list(range(20))


def test_a_batch_sampler_of_ones_own_is_divided(rig2: Rig) -> None:
    own = "type('Own', (BatchSampler,), {})(RandomSampler(numbers), 5, False)"
    first, second = seen(rig2, f"DataLoader(numbers, batch_sampler={own})")
    assert sorted(flat(first) + flat(second)) == list(range(20))


def test_one_that_does_not_shuffle_is_left_whole(rig2: Rig) -> None:
    first, second = seen(rig2, "DataLoader(numbers, batch_size=5)")
    assert flat(first) == flat(second) == list(range(20))
    assert any("does not shuffle" in text for text in rig2.last.notes)  # type: ignore[attr-defined]


def test_an_iterable_dataset_is_left_whole_and_it_is_said(rig2: Rig) -> None:
    cell = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(X[:8])
model = nn.Linear(64, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
num_batches = 0
for xb in DataLoader(Stream(), batch_size=2):
    optimizer.zero_grad()
    model(xb).mean().backward()
    optimizer.step()
    num_batches += 1
"""
    run = rig2.train(cell)
    assert rig2.common("num_batches") == 4
    assert any("IterableDataset" in text for text in run.notes)


def test_evaluation_sees_everything(rig2: Rig) -> None:
    cell = """
loader = DataLoader(TensorDataset(torch.arange(20)), batch_size=6, shuffle=True)
with torch.no_grad():
    seen = sorted(v for (batch,) in loader for v in batch.tolist())
"""
    rig2.train(cell)
    assert rig2.common("seen") == list(range(20))
