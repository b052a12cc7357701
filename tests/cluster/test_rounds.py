"""Strategies in rounds, `local-sgd:H` and `diloco:H`: beside the same algorithm in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

# Any: what a cell leaves in its namespace.

HEAD = """
torch.manual_seed(0)
loader = DataLoader(TensorDataset(X[:1792], y[:1792]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 10))
"""
CELL = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(3):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
"""
PLAIN = """
import copy
replicas = [copy.deepcopy(model) for _ in range(2)]
optimizers = [torch.optim.SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]
outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)

@torch.no_grad()
def combine():
    for own, *others in zip(model.parameters(), *(r.parameters() for r in replicas)):
        mean = sum(others) / 2
        own.grad = own - mean
        if not IS_DILOCO:
            own.copy_(mean)
    if IS_DILOCO:
        outer.step()
    for own, *others in zip(model.parameters(), *(r.parameters() for r in replicas)):
        for other in others:
            other.copy_(own)
    for name, own in model.named_buffers():
        if own.is_floating_point():
            own.copy_(sum(r.get_buffer(name) for r in replicas) / 2)
            for r in replicas:
                r.get_buffer(name).copy_(own)

num = 0
for epoch in range(3):
    for i, (xb, yb) in enumerate(loader):
        optimizers[i % 2].zero_grad()
        cross_entropy(replicas[i % 2](xb), yb).backward()
        optimizers[i % 2].step()
        num += i % 2
        if i % 2 and num % H == 0:
            combine()
if num % H:
    combine()
"""
# A few numbers of each tensor, which all of its elements have a part in.
STATE = """
[[float(t.double().flatten().cos().sum()), float(t.double().flatten().diff().square().sum())]
 for t in model.state_dict().values()]
"""
TRACKED = 6
"""Place of the number of batches that BatchNorm has seen."""


def _flat(values: list[list[float]]) -> list[float]:
    return [number for value in values for number in value]


@pytest.mark.parametrize("strategy", ["local-sgd:8", "local-sgd:1", "diloco:8"])
def test_it_is_the_algorithm(rig2: Rig, strategy: str) -> None:
    name, _, every = strategy.partition(":")
    setting = f"H, IS_DILOCO = {every}, {name == 'diloco'}\n"
    plain = rig2.plain(f"{setting}{HEAD}{PLAIN}\nstate = {STATE.strip()}")["state"]
    run = rig2.session.train(HEAD + CELL, recipe=Recipe(strategy=strategy))
    found = rig2.common(STATE.strip())
    del plain[TRACKED], found[TRACKED]  # the plain model has only taken what others trained
    assert _flat(found) == pytest.approx(_flat(plain), rel=1e-4)
    assert run.history.num_steps == 42
    assert not any("different weights" in note for note in run.notes)


def test_what_is_done_is_said_and_measured(rig2: Rig) -> None:
    run = rig2.session.train(HEAD + CELL, recipe=Recipe(strategy="local-sgd:8"))
    assert any("weights averaged every 8 steps" in note for note in run.notes)
    divergence = run.history["divergence"]
    assert [i + 1 for i, value in enumerate(divergence) if value > 0] == [8, 16, 24, 32, 40, 42]
    sent = run.history["sent_bytes"]
    assert [i + 1 for i, value in enumerate(sent) if value != 0] == [8, 16, 24, 32, 40]
    # The last round ends the run, and no step.
    assert [summary["sent_bytes"] for summary in run.summaries] == [sent.max()] * 2


UNEVEN = """
import itertools
torch.manual_seed(0)
body, head = nn.Linear(64, 16), nn.Linear(16, 10)
optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (body, head)]
picks = torch.randint(1797, (40, 32))[: 12 + 7 * rank]
for pick in picks:
    for optimizer in optimizers:
        optimizer.zero_grad()
    cross_entropy(head(body(X[pick]).tanh()), y[pick]).backward()
    for optimizer in optimizers:
        optimizer.step()
"""
EVERYTHING = """
[[float(t.double().sum()) for t in m.state_dict().values()] for m in (body, head)], [
    [float(t.double().sum()) for s in o.state_dict()["state"].values() for t in s.values()]
    for o in optimizers]
"""


@pytest.mark.parametrize("strategy", ["local-sgd:4", "diloco:4"])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ({}, {}),
        ({"accumulate": 2}, {}),
        ({"amp": "bf16"}, {"max_steps": 9}),
    ],
)
def test_all_is_equal_at_the_end_though_ranks_made_other_numbers_of_steps(
    rig2: Rig, strategy: str, recipe: dict[str, Any], options: dict[str, Any]
) -> None:
    run = rig2.session.train(
        UNEVEN, recipe=Recipe(strategy=strategy, **recipe), options=RunOptions(**options)
    )
    assert run.state == ("stopped" if options else "finished")
    weights, state = rig2.common(EVERYTHING.strip())
    assert len(weights[0] + weights[1] + state[0] + state[1]) == 4 + 12


def test_a_step_with_a_closure_is_a_rank_s_own(rig2: Rig) -> None:
    cell = (
        HEAD
        + """
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for xb, yb in loader:
        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(xb), yb)
            loss.backward()
            return loss
        optimizer.step(closure)
    """.replace("\n    ", "\n")
    )
    run = rig2.session.train(cell, recipe=Recipe(strategy="local-sgd:4"))
    assert run.history["loss"][-1] < 0.5 * run.history["loss"][0]
    rig2.assert_same_weights("model")
