"""Every recipe gets as far as the plain run with the same number of samples, on real data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

DIGITS = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
for epoch in range(12):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
    scheduler.step()
with torch.no_grad():
    final = cross_entropy(model(X), y).item()
"""
TEXT_DATA = """
import argparse, textwrap
from pathlib import Path
text = "".join(Path(module.__file__).read_text() for module in (argparse, textwrap))
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
windows = codes.unfold(0, 9, 3)
letters_set = TensorDataset(windows[:, :8], windows[:, 8])
"""
TEXT = """
torch.manual_seed(0)
loader = DataLoader(letters_set, batch_size=256, shuffle=True)
model = nn.Sequential(nn.Embedding(len(letters), 16), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(),
                      nn.Linear(64, len(letters)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
for epoch in range(3):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
    scheduler.step()
with torch.no_grad():
    final = cross_entropy(model(windows[:, :8]), windows[:, 8]).item()
"""
RECIPES: list[dict[str, Any]] = [
    *({"compress": m} for m in ("fp16", "bf16", "int8", "int4", "sign", "topk:0.05", "powersgd:4")),
    {"amp": "bf16"},
    {"amp": "fp16"},
    {"accumulate": 2},
    {"amp": "bf16", "accumulate": 2, "compress": "int8"},
]
"""With `accumulate` the written batch is halved: then the two make the same steps."""


@pytest.mark.parametrize(("earlier", "cell", "half"), [("", DIGITS, 32), (TEXT_DATA, TEXT, 128)])
def test_every_recipe_gets_as_far_as_the_plain_run(
    rig2: Rig, earlier: str, cell: str, half: int
) -> None:
    rig2.session.execute(earlier)

    def loss(**flags: Any) -> float:
        flags |= {"batch_size": half} if "accumulate" in flags else {}
        rig2.session.train(cell, recipe=Recipe(batch="global", **flags))
        return float(rig2.common("final"))

    plain = loss()
    found = {str(flags): loss(**flags) / plain for flags in RECIPES}
    worst = {flags: ratio for flags, ratio in found.items() if ratio >= 1.02}
    assert not worst, plain
