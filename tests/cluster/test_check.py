"""`%dist_check`: planted differences of each kind are found and named."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from rig import DIGITS

from dtkit.errors import InvalidInputError, RankError
from dtkit.guard.processes import Identity
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    import dtkit

CELL = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=60, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
extra = torch.arange(3.0)
for xb, yb in loader:
    optimizer.zero_grad()
    cross_entropy(model(xb), yb).backward()
    optimizer.step()
"""
PLANTED = {
    "model[3].weight.data[1, 2] += 3e-4": (
        r"model\.3\.weight differs: rank 1 from ranks 0, 2; max \|difference\| 3\.0e-04, 1 of 320 "
        r"elements, first element 34: .*%dist_pull model --rank 0, then %dist_push model"
    ),
    "model[1].running_var.mul_(2)": r"model\.1\.running_var differs: rank 1 from ranks 0, 2; max",
    "model[1].num_batches_tracked += 1": r"num_batches_tracked differs: .*: 11 against 10",
    "optimizer.state[model[0].bias]['exp_avg'] += 1": (
        r"optimizer\.state\[model\.0\.bias\]\.exp_avg differs: rank 1 .*1\.0e\+00, 32 of 32"
    ),
    "optimizer.param_groups[0]['lr'] = 0.5": (
        r"optimizer\.param_groups\[0\]\.lr differs: rank 1 from ranks 0, 2; 0\.5 against 0\.001"
    ),
    "model[3] = nn.Linear(32, 12)": (
        r"model\.3\.weight differs: rank 1 .*; \(12, 32\) float32 against \(10, 32\) float32"
    ),
    "model[0].bias.data[5] = float('nan')": r"model\.0\.bias differs: .*first element 5: nan",
    "del model": r"model\.0\.weight is on ranks 0, 2 and not on rank 1",
}


@pytest.fixture(scope="module")
def session3(start_session: Callable[[int], dtkit.Session]) -> dtkit.Session:
    session = start_session(3)
    session.execute(DIGITS)
    return session


def test_after_a_run_all_is_equal_and_each_sample_was_drawn_once(session3: dtkit.Session) -> None:
    session3.train(CELL)
    found = session3.check()
    assert found.is_equal
    assert not found.difference
    assert found.lines == (
        "model: 6 parameters, 3 buffers: equal on all ranks",
        "optimizer: 12 settings, 18 optimizer state: equal on all ranks",
        "loader: 599 + 599 + 599 samples, disjoint, all 1,797 of them",
        (
            "random numbers: numpy, python equal on all ranks; torch of each rank's own, as "
            "dropout and augmentation want"
        ),
    )


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_named(session3: dtkit.Session, planted: str) -> None:
    session3.train(CELL)
    session3.execute(planted, ranks=[1])
    found = session3.check()
    assert not found.is_equal
    assert re.search(PLANTED[planted], found.difference), found.difference
    assert str(found).startswith(found.difference)


def test_named_things_only(session3: dtkit.Session) -> None:
    session3.train(CELL)
    session3.execute("extra[2] += rank; scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)")
    assert session3.check(["model", "scheduler"]).is_equal
    assert "extra differs: rank 1 from rank 0" in session3.check(["extra"]).difference.replace(
        "ranks 1, 2", "rank 1"
    )
    with pytest.raises(InvalidInputError, match="no rank has a mdoel"):
        session3.check(["mdoel"])
    with pytest.raises(RankError, match="has nothing to compare"):
        session3.check(["digits"])


def test_a_sampler_that_gives_all_ranks_the_same(session3: dtkit.Session) -> None:
    session3.execute(
        "from torch.utils.data import DistributedSampler\n"
        "own = DataLoader(train_set, sampler=DistributedSampler(train_set, 3, rank))\n"
        "same = DataLoader(train_set, sampler=DistributedSampler(train_set, 3, min(rank, 1)))"
    )
    found = session3.check()
    assert "same: 599 of 1,797 samples are drawn by several ranks" in found.difference
    assert "by ranks 1, 2. What to do: give a DistributedSampler rank=rank" in found.difference
    assert any(line.startswith("own: 599 + 599 + 599 samples, disjoint") for line in found.lines)
    session3.execute("del own, same")


def test_after_gossip_the_ranks_are_equal_too(session3: dtkit.Session) -> None:
    session3.train(CELL, recipe=Recipe(strategy="gossip"))
    found = session3.check()
    assert found.is_equal, found
    assert any("samples, disjoint, all 1,797 of them" in line for line in found.lines)


def test_engines_do_not_wait_until_tensorboard_has_ended(session3: dtkit.Session) -> None:
    """Jupyter kills a kernel that takes seconds to end; what it has not ended by then lives on.

    The last test here, since it ends the session.
    """

    class Board:
        living: list[bool] | None = None

        def close(self) -> None:
            self.living = [process.is_alive for process in processes]

    processes = [found for pid in session3.pids() if (found := Identity.of(pid))]
    session3._boards = board = Board()  # type: ignore[assignment]
    session3.close()
    assert processes
    assert board.living == [False] * len(processes)
