"""Four ranks, and one, follow the loss curve of one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rig import relative_error

from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

TOLERANCE = 1e-5

CELL = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=72, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = OPTIMIZER
losses = []
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        LOSS
        optimizer.step()
        losses.append(loss.item())
"""
PLAIN = "loss = cross_entropy(model(xb), yb); loss.backward()"
CLIPPED = PLAIN + "; nn.utils.clip_grad_norm_(model.parameters(), 0.5)"
TWICE = (
    "loss = cross_entropy(model(xb), yb); loss.backward(retain_graph=True); (0.1 * loss).backward()"
)
CASES = {
    "sgd": ("torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)", PLAIN, 1.0),
    "adam-clipped": ("torch.optim.Adam(model.parameters(), lr=1e-3)", CLIPPED, 1.0),
    "two-passes": ("torch.optim.SGD(model.parameters(), lr=0.1)", TWICE, 1.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_the_loss_curve_is_that_of_one_device(rig4: Rig, case: str, num_ranks: int) -> None:
    optimizer, loss, factor = CASES[case]
    cell = CELL.replace("OPTIMIZER", optimizer).replace("LOSS", loss)
    expected = [factor * value for value in rig4.plain(cell)["losses"]]
    run = rig4.session.train(cell, recipe=Recipe(batch="global"), ranks=range(num_ranks))
    assert len(expected) == 100
    assert relative_error(run.history["loss"], expected) < TOLERANCE


SOME_RANKS = """
torch.manual_seed(0)
group = dist.new_group([1, 3], use_local_synchronization=True) if OWN_GROUP else None
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
model = nn.parallel.DistributedDataParallel(model, process_group=group) if group else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(4):
    for xb, yb in DataLoader(train_set, batch_size=72):
        optimizer.zero_grad()
        loss = cross_entropy(model(xb[rank % 3 :: 2]), yb[rank % 3 :: 2])
        loss.backward()
        optimizer.step()
weights = [float(p.double().sum()) for p in model.parameters()]
"""


@pytest.mark.parametrize("is_own_group", [False, True])
@pytest.mark.parametrize("spec", ["int8", "topk:0.05", "powersgd:4"])
def test_some_of_the_ranks_compress_among_themselves(
    rig4: Rig,
    spec: str,
    is_own_group: bool,  # noqa: FBT001  pytest's
) -> None:
    """Of the whole group (`--ranks`), and in a process group of the cell's own."""
    cell = SOME_RANKS.replace("OWN_GROUP", str(is_own_group))
    recipe = Recipe(compress=spec)
    run = rig4.session.train(cell, recipe=recipe, ranks=[1, 3])
    loss = run.history["loss"]
    assert loss[-5:].mean() < 0.5 * loss[:3].mean()
    results = rig4.session.execute("weights", ranks=[1, 3]).results
    assert results[1] == results[3]
    num = 64 * 32 + 32 + 32 * 10 + 10
    assert run.history["raw_bytes"][-1] == pytest.approx(4 * num, rel=0.01)
    assert run.history["sent_bytes"][-1] < 2.1 * num


def test_a_method_that_gathers_says_when_there_are_too_many_ranks(rig4: Rig) -> None:
    cell = """
model = nn.Linear(64, 256)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(3):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
"""
    for method, is_said in (("int8", True), ("fp16", False)):
        run = rig4.session.train(cell, recipe=Recipe(compress=method))
        assert any("each of the 3 others" in note for note in run.notes) is is_said


def test_ranks_that_have_made_different_groups_before_form_another(rig4: Rig) -> None:
    groups = "len(torch.distributed.distributed_c10d._world.pg_map)"
    for ranks in ([1, 3], [0, 1], [0, 1, 2]):
        run = rig4.session.train("model = nn.Linear(2, 2)", ranks=ranks)
        assert run.state == "finished"
    before = rig4.values(groups)
    rig4.session.train("model = nn.Linear(2, 2)", ranks=[1, 3])
    assert rig4.values(groups) == before
