"""Four ranks, and one, follow the loss curve of one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rig import relative_error

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
    from dtkit.recipe import Recipe

    run = rig4.session.train(cell, recipe=Recipe(batch="global"), ranks=range(num_ranks))
    assert len(expected) == 100
    assert relative_error(run.history["loss"], expected) < TOLERANCE
