"""What a loss that is not finite does to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

CELL = """
torch.manual_seed(0)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
num_steps = 0
for i in range(6):
    optimizer.zero_grad()
    loss = cross_entropy(model(X[:64]), y[:64])
    if rank == 1 and i >= 3:
        loss = loss * float("nan")
    loss.backward()
    optimizer.step()
    num_steps += 1
"""


def test_a_note_names_rank_and_step_once(rig2: Rig) -> None:
    run = rig2.session.train(CELL)
    assert run.state == "finished"
    found = [note for note in run.notes if "the loss is nan on rank 1 in step 4" in note]
    assert len(found) == 1


def test_stop_ends_the_run_before_the_step_and_keeps_the_weights(rig2: Rig) -> None:
    with pytest.raises(RankError, match="loss is nan on rank 1 in step 4") as caught:
        rig2.session.train(CELL, options=RunOptions(on_nan="stop"))
    assert [f.rank for f in caught.value.causes] == [1]
    assert caught.value.causes[0].ename == "NonFiniteLossError"
    assert rig2.common("num_steps") == 3
    assert rig2.common("bool(model.weight.isfinite().all())")
    rig2.assert_same_weights("model")


def test_ignore_says_nothing(rig2: Rig) -> None:
    run = rig2.session.train(CELL, options=RunOptions(on_nan="ignore"))
    assert not [note for note in run.notes if "nan" in note]
