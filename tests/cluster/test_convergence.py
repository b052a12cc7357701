"""Every recipe gets as far as plain training does, on digits and on text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

    import dtkit

# Any: fields of a recipe.

RECIPES: list[dict[str, Any]] = [
    *({"compress": spec} for spec in ("fp16", "bf16", "int8", "int4", "sign")),
    *({"compress": spec} for spec in ("topk:0.05", "powersgd:16")),
    *({"amp": amp} for amp in ("bf16", "fp16")),
    {"accumulate": 4},
]
COARSE = ("int4", "sign", "topk:0.05", "powersgd:16")
"""What can be far from plain training; the others are held to it on text in `--long` only."""
TOLERANCE = 1.02

DIGITS = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
for epoch in range(20):
    for xb, yb in loader:
        loss = cross_entropy(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
with torch.no_grad():
    reached = float(cross_entropy(model(X), y))
"""

LIBRARY = """
import argparse, ast, inspect, random, typing
text = "".join(map(inspect.getsource, (argparse, typing, random, ast)))[:130_000]
letters = sorted(set(text))
windows = torch.tensor([letters.index(c) for c in text]).unfold(0, 9, 1)
"""
TEXT = """
torch.manual_seed(0)
loader = DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), batch_size=256, shuffle=True)
model = nn.Sequential(nn.Embedding(len(letters), 16), nn.Flatten(), nn.Linear(128, 128), nn.ReLU(),
                      nn.Linear(128, len(letters)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(windows) // 256)
for xb, yb in loader:
    loss = cross_entropy(model(xb), yb)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
with torch.no_grad():
    reached = float(cross_entropy(model(windows[:20_000, :-1]), windows[:20_000, -1]))
"""


def reached(session: dtkit.Session, cell: str, **recipe: Any) -> float:
    """Train, and return the loss at the end."""
    if "accumulate" in recipe:  # the same samples make a step
        recipe["batch_size"] = (64 if cell == DIGITS else 256) // recipe["accumulate"]
    session.train(cell, recipe=Recipe(batch="global", **recipe))
    return float(session.execute("reached").results[0])


@pytest.fixture(scope="module")
def plain(rig2: Rig) -> dict[str, float]:
    rig2.session.execute(LIBRARY)
    return {cell: reached(rig2.session, cell) for cell in (DIGITS, TEXT)}


CASES = [
    *(pytest.param(recipe, DIGITS, id=f"{recipe}-digits") for recipe in RECIPES),
    *(
        pytest.param(
            recipe, TEXT, id=f"{recipe}-text",
            marks=() if recipe.get("compress") in COARSE else pytest.mark.long,
        )
        for recipe in RECIPES
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "cell"), CASES)
def test_a_recipe_gets_as_far_as_plain_training(
    rig2: Rig, plain: dict[str, float], recipe: dict[str, Any], cell: str
) -> None:
    loss = reached(rig2.session, cell, **recipe)
    assert loss < TOLERANCE * plain[cell]
