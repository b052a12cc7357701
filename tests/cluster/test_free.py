"""Strategies on four ranks: with and without a straggler, and when a rank dies."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rig import DIGITS

from dtkit.errors import InvalidInputError, RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

HEAD = """
import os, time
torch.manual_seed(0)
picks = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
train, test = picks[:1500], picks[1500:]
loader = DataLoader(TensorDataset(X[train], y[train]), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
"""
STEP = """
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
"""
CELL = HEAD + "for epoch in range(EPOCHS):\n    for xb, yb in loader:" + STEP
ACCURACY = "float((model.eval()(X[test]).argmax(1) == y[test]).float().mean())"
EVERYTHING = """
[float(t.double().sum()) for t in model.state_dict().values()], [
    float(t.double().sum()) for s in optimizer.state_dict()["state"].values() for t in s.values()]
"""


@pytest.mark.parametrize("is_slow", [False, True], ids=["even", "straggler"])
@pytest.mark.parametrize("strategy", ["local-sgd:8", "diloco:8", "async:8", "async:inf", "gossip"])
def test_digits_are_learnt(rig4: Rig, strategy: str, *, is_slow: bool) -> None:
    pause = f"        time.sleep({'0.005 if rank == 3 else 0.001' if is_slow else '0'})\n"
    cell = CELL.replace("EPOCHS", "8") + pause
    run = rig4.session.train(cell, recipe=Recipe(strategy=strategy))
    assert run.state == "finished"
    assert rig4.common(ACCURACY) > 0.9
    weights, state = rig4.common(EVERYTHING.strip())
    assert (len(weights), len(state)) == (9, 18)
    assert "divergence" in run.history


@pytest.mark.parametrize(("strategy", "vectors"), [("async:1", 2 * 3 / 4), ("gossip", 2)])
def test_what_answers_carry_is_counted_too(rig4: Rig, strategy: str, vectors: float) -> None:
    """Each exchange carries weights there and back; the server of `async` is one of four ranks."""
    run = rig4.session.train(CELL.replace("EPOCHS", "4"), recipe=Recipe(strategy=strategy))
    num = rig4.common(
        "sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())"
    )
    sent = run.history["sent_bytes"]
    assert len(sent) > 150
    assert 0.8 < sent.mean() / (4 * num * vectors) < 1.2
    assert sum(summary.get("sent_bytes", 0) for summary in run.summaries) > 0
    if strategy != "gossip":  # in which a partner may be gone
        assert np.isfinite(run.history["divergence"]).all()


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        ("async:8", "batch_size=32, shuffle=True"),
        ("gossip", "batch_sampler=AtOnce()"),  # draws its order when it is asked for batches
    ],
)
def test_each_sample_is_trained_on_once_an_epoch_by_whichever_rank(
    rig4: Rig, strategy: str, order: str
) -> None:
    cell = (
        HEAD
        + """
indices = TensorDataset(torch.arange(1500), y[train])
class AtOnce:
    def __iter__(self):
        return iter([part.tolist() for part in torch.randperm(1500).split(32)])
    def __len__(self):
        return 47
loader = DataLoader(indices, ORDER)
seen = []
for epoch in range(3):
    seen.append([])
    for pick, yb in loader:
        xb = X[train][pick]
        seen[-1] += pick.tolist()
        time.sleep(0.02 if rank == 2 else 0)"""
        + STEP
    ).replace("ORDER", order)
    run = rig4.session.train(cell, recipe=Recipe(strategy=strategy))
    by_rank = rig4.values("{len(s): None for s in seen} and [sum(s) for s in seen]")
    assert [sum(sums) for sums in zip(*by_rank, strict=True)] == [1500 * 1499 // 2] * 3
    sizes = rig4.values("[len(s) for s in seen]")
    assert [sum(size) for size in zip(*sizes, strict=True)] == [1500] * 3
    assert min(itertools.chain(*sizes)) >= 28  # a batch each, whatever happens
    assert run.history.num_steps == 3 * 47
    assert sum(num for _, num in run.view().staleness) > 100


def test_two_models_one_after_the_other(rig4: Rig) -> None:
    cell = (
        HEAD
        + """
models = []
for fold in range(3):
    model = nn.Linear(64, 10)
    models.append(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for xb, yb in loader:
        time.sleep(0.003 if rank == fold else 0)"""
        + STEP
    )
    run = rig4.session.train(cell, recipe=Recipe(strategy="async:1"))
    assert np.nanmax(run.history["staleness"]) <= 3
    rig4.assert_same_weights("models[0]", "models[1]", "models[2]")


@pytest.mark.parametrize("strategy", ["async:2", "gossip"])
def test_it_stops_with_equal_weights(rig4: Rig, strategy: str) -> None:
    run, steps = rig4.session.training(
        CELL.replace("range(EPOCHS)", "itertools.count()").replace("os", "itertools, os", 1),
        recipe=Recipe(strategy=strategy),
    )
    for _ in steps:
        if run.view().step > 30 and not run.requests.is_stop:
            run.stop()
        run.requests.alarm.wait(0.02)
    assert run.state == "stopped"
    rig4.assert_same_weights("model")


def test_who_waits_at_the_end_is_freed(rig4: Rig) -> None:
    cell = CELL.replace("EPOCHS", "1") + "while rank == 0:\n    time.sleep(0.01)\n"
    run, steps = rig4.session.training(cell, recipe=Recipe(strategy="gossip"))
    for _ in steps:
        if run.view().step > 30 and not run.requests.is_now:
            run.requests.stop_now()
        run.requests.alarm.wait(0.02)
    assert run.state == "stopped"
    assert rig4.common("1 + 1") == 2


def test_a_checkpoint_at_the_end_of_an_epoch(rig4: Rig) -> None:
    cell = (
        CELL.replace("EPOCHS", "2")
        + """
    time.sleep(0.02 * rank)
    dtkit.checkpoint(model=model).wait()
""".replace("wait()\n", "wait()\n    ")
    )
    cell = "import dtkit\n" + cell
    run = rig4.session.train(cell, recipe=Recipe(strategy="async:1"))
    assert len(list((run.dir / "checkpoints").glob("step-*"))) >= 1
    with pytest.raises(InvalidInputError, match="checkpoint-every counts steps"):
        rig4.session.train(
            cell, recipe=Recipe(strategy="async:1"), options=RunOptions(checkpoint_every=10)
        )


def test_ranks_that_train_other_weights_are_told_and_not_left_to_themselves(rig4: Rig) -> None:
    cell = CELL.replace("EPOCHS", "1").replace(
        "for epoch", "model[0].weight.requires_grad_(rank != 2)\nfor epoch", 1
    )
    with pytest.raises(RankError, match=r"cannot answer 'update': RuntimeError: .*size"):
        rig4.session.train(cell, recipe=Recipe(strategy="async:8"))


@pytest.mark.parametrize(
    ("strategy", "victim", "when"),
    [
        ("async:4", 0, "epoch"),
        ("gossip", 1, "epoch"),
        ("async:4", 0, "data"),
        ("async:4", 2, "step"),
    ],
)
def test_a_rank_that_dies_does_not_stop_the_others(
    rig4: Rig, owned_pids: set[int], strategy: str, victim: int, when: str
) -> None:
    death = f"if rank == {victim}:\n    os.kill(os.getpid(), 9)\n"
    cell = CELL.replace("EPOCHS", "5")
    if when == "epoch":  # the third is over
        cell += f"    if epoch == 2 and rank == {victim}:\n        os.kill(os.getpid(), 9)\n"
    elif when == "step":  # before its first
        cell = cell.replace("for epoch", f"{death}for epoch", 1)
    else:  # before it has made a model
        cell = cell.replace("picks =", f"{death}picks =", 1)
    session = rig4.session
    run = session.train(cell, recipe=Recipe(strategy=strategy))
    assert run.state == "finished"
    assert any(f"rank {victim} died, and the others went on" in note for note in run.notes)
    others = [rank for rank in session.ranks if rank != victim]
    results = session.execute(ACCURACY, ranks=others).results
    assert len({results[rank] for rank in others}) == 1
    assert float(results[others[0]]) > 0.9
    session.restart()
    owned_pids.update(session.pids())
    session.execute(DIGITS)
