"""The gradient noise scale against what it is: a problem on which it can be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

    from dtkit.driver.runs.run import Run

# Weights that hardly move: the exact scale stays what it is at the start.
CELL = """
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(4096, 20, generator=generator)
targets = inputs @ torch.randn(20, generator=generator) + 3 * torch.randn(4096, generator=generator)
torch.manual_seed(1)
model = nn.Linear(20, 1, bias=False)
nn.init.zeros_(model.weight)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True, drop_last=True)
optimizer = torch.optim.OPTIMIZER(model.parameters(), lr=1e-9)
for epoch in range(EPOCHS):
    for xb, yb in loader:
        optimizer.zero_grad()
        for part, wanted in zip(xb.chunk(PASSES), yb.chunk(PASSES)):
            loss = ((model(part).squeeze(1) - wanted) ** 2).mean() / PASSES
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
"""
EXACT = """
per_sample = -2 * targets[:, None] * inputs
mean = per_sample.mean(0)
exact = float((per_sample - mean).square().sum(1).mean() / mean.square().sum())
"""


def cell(batch: int = 8, epochs: int = 4, passes: int = 1, optimizer: str = "SGD") -> str:
    words = {"BATCH": batch, "EPOCHS": epochs, "PASSES": passes, "OPTIMIZER": optimizer}
    text = CELL
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


def noise_scale(run: Run) -> float:
    known = run.history["noise_scale"]
    known = known[np.isfinite(known)]
    return float(np.median(known[len(known) // 4 :]))


@pytest.fixture(scope="module")
def exact(rig2: Rig) -> float:
    rig2.session.execute(cell(epochs=0) + EXACT)
    return float(rig2.common("exact"))


@pytest.mark.parametrize(("batch", "passes"), [(8, 1), (8, 2), (32, 1)])
def test_it_is_the_trace_over_the_squared_length(
    rig2: Rig, exact: float, batch: int, passes: int
) -> None:
    """Also of clipped gradients, and of several passes in a step."""
    run = rig2.session.train(cell(batch, epochs=batch // 2, passes=passes))
    assert noise_scale(run) == pytest.approx(exact, rel=0.2)


def test_a_run_places_its_batch_and_proposes_one(rig2: Rig) -> None:
    run = rig2.session.train(cell(batch=2, epochs=1, optimizer="Adam"))
    (note,) = [note for note in run.notes if "noise scale" in note]
    assert note.startswith("batch of 4 is small")
    assert "To try: 16" in note
    assert "learning rate 2e-09 (square root scaling)" in note
    assert run.summaries == ({"optimizer": "Adam"},) * 2


def test_it_is_silent_where_it_does_not_know(rig2: Rig) -> None:
    twice = cell(epochs=1).replace("optimizer.step()", "optimizer.step(); other.step()")
    other = "other = torch.optim.SGD(model.parameters(), lr=1e-9)"
    twice = twice.replace("for epoch", f"{other}\nfor epoch")
    whole = cell(epochs=1).replace("shuffle=True", "shuffle=False")
    runs = [rig2.session.train(text) for text in (twice, whole)]
    runs.append(rig2.session.train(cell(epochs=1), recipe=Recipe(manual=True)))
    runs.append(rig2.session.train(cell(epochs=1), recipe=Recipe(compress="topk:0.1")))
    for run in runs:
        assert not [note for note in run.notes if "noise scale" in note]


def test_unequal_shares_are_not_measured(rig2: Rig) -> None:
    text = cell(batch=9, epochs=1).replace("drop_last=True", "drop_last=False")
    run = rig2.session.train(text, recipe=Recipe(batch="global"))
    assert "noise_scale" not in run.history
