"""`--amp`: what is computed in which type, and what becomes of steps that overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from rig import relative_error

from dtkit.engine.precision import measure_slowdown, slowdown_note
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

TYPES = """
import torch.nn.functional as F
seen = {}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
    def forward(self, x):
        h = torch.relu(self.first(x))
        seen["inside"] = h.dtype
        if h.requires_grad:
            h.register_hook(lambda g: seen.update(backward=torch.is_autocast_enabled("cpu")))
        return {"logits": self.last(h)}
model, teacher = Net(), nn.Linear(64, 10).eval()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in DataLoader(train_set, batch_size=600, shuffle=True):
    seen["data"] = (xb @ xb.t()).dtype
    with torch.no_grad():
        seen["teacher"] = teacher(xb).dtype
        seen["after teacher"] = (xb @ xb.t()).dtype
    out = model(xb)["logits"]
    seen["out"] = out.dtype
    seen["loss"] = (out @ out.t()).dtype
    loss = cross_entropy(out, yb)
    optimizer.zero_grad()
    loss.backward()
    seen["after"] = (xb @ xb.t()).dtype
    optimizer.step()
model.eval()
with torch.no_grad():
    numbers = model(X)["logits"].numpy()
    seen["evaluated in"] = seen["inside"]
    seen["after evaluation"] = (X @ X.t()).dtype
model.train()
shape = model(X)["logits"].shape
seen = {k: str(v) for k, v in seen.items()}
"""
AFTER = 'str((X @ X.t()).dtype), torch.is_autocast_enabled("cpu"), nn.Module.__call__.__module__'


@pytest.mark.parametrize(("amp", "narrow"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_forward_and_loss_are_narrow_and_nothing_else_is(rig2: Rig, amp: str, narrow: str) -> None:
    rig2.session.train(TYPES, recipe=Recipe(amp=amp))
    narrow, wide = f"torch.{narrow}", "torch.float32"
    assert rig2.common("seen") == {
        "data": wide,
        "teacher": wide,
        "after teacher": wide,
        "inside": narrow,
        "out": wide,
        "loss": narrow,
        "backward": "False",
        "after": wide,
        "evaluated in": narrow,
        "after evaluation": wide,
    }
    # The last forward pass of the cell was followed by no backward pass.
    assert rig2.common(AFTER)[:2] == (wide, False)
    assert "dtkit" not in rig2.common(AFTER)[2]


TRAINING = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2OPTIONS)
losses = []
for epoch in range(3):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
"""
PLAIN = TRAINING.replace("OPTIONS", "")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_curve_is_that_of_float32_to_rounding(rig2: Rig, amp: str) -> None:
    expected = rig2.plain(PLAIN)["losses"]
    run = rig2.session.train(PLAIN, recipe=Recipe(batch="global", amp=amp))
    assert run.history.num_steps == len(expected)
    assert relative_error(run.history["loss"][:20], expected[:20]) < 0.03
    assert abs(run.history["loss"][-20:].mean() / np.mean(expected[-20:]) - 1) < 0.1
    rig2.assert_same_weights("model")


OVERFLOW = """
torch.manual_seed(0)
model = nn.Linear(64, 10)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=FUSED)
weights = []
for i in range(8):
    optimizer.zero_grad()
    loss = cross_entropy(model(X[:64]), y[:64])
    if i in (2, 5) and rank == 1:
        loss = loss * float("inf")
    loss.backward()
    optimizer.step()
    weights.append(float(model.weight.double().sum()))
skipped = [b == a for a, b in zip(weights, weights[1:])]
"""


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_are_skipped_on_all_ranks_and_counted_once(
    rig2: Rig, *, fused: bool
) -> None:
    text = OVERFLOW.replace("FUSED", str(fused))
    run = rig2.session.train(text, recipe=Recipe(amp="fp16"))
    assert rig2.common("skipped") == [False, True, False, False, True, False, False]
    assert run.history.num_steps == 6
    assert np.nanmax(run.history["skipped_steps"]) == 2
    assert any("2 steps skipped while the loss scale was found (now 16384)" in n for n in run.notes)
    rig2.assert_same_weights("model")


def test_a_cell_with_autocast_of_its_own_is_left_to_it(rig2: Rig) -> None:
    text = """
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.cuda.amp.GradScaler()
for xb, yb in DataLoader(train_set, batch_size=900, shuffle=True):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(xb)
    dtype = str(out.dtype)
    loss = cross_entropy(out, yb)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""
    run = rig2.session.train(text, recipe=Recipe(amp="fp16"))
    assert rig2.common("dtype") == "torch.bfloat16"
    assert sum("left to it" in note for note in run.notes) == 1


def test_autocast_in_an_earlier_cell_is_seen_when_it_is_used(rig2: Rig) -> None:
    rig2.session.execute("""
def narrow(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)
""")
    text = """
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
out = narrow(model, X)
dtype = str(out.dtype)
cross_entropy(out, y).backward()
optimizer.step()
"""
    run = rig2.session.train(text, recipe=Recipe(amp="bf16"))
    assert rig2.common("dtype") == "torch.bfloat16"
    assert sum("left to it" in note for note in run.notes) == 1


def test_a_forward_pass_that_raises_leaves_nothing_on(rig2: Rig) -> None:
    text = """
model = nn.Linear(64, 10)
try:
    model(X[:, :3])
except RuntimeError:
    inside = str((X @ X.t()).dtype)
"""
    rig2.session.train(text, recipe=Recipe(amp="bf16"))
    assert rig2.common("inside") == "torch.float32"


def test_a_slower_precision_is_said() -> None:
    cpu = torch.device("cpu")
    assert "--amp bf16 makes this CPU slower" in slowdown_note("bf16", 6.9, cpu)
    assert "6.9 times" in slowdown_note("bf16", 6.9, cpu)
    assert slowdown_note("bf16", 0.5, cpu) == slowdown_note("fp16", 1.05, cpu) == ""
    assert 0.01 < measure_slowdown("bf16", cpu) < 1000


def test_it_works_on_one_rank_and_with_accumulation(rig2: Rig) -> None:
    run = rig2.session.train(PLAIN, recipe=Recipe(amp="fp16", accumulate=2), ranks=[0])
    assert run.history.num_steps == 3 * 15
    assert run.history["loss"][-5:].mean() < 0.5 * run.history["loss"][0]
