"""One cell under several recipes, each from the same start, on live engines."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dtkit
from dtkit.errors import InvalidInputError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

EARLIER = """
import dataclasses, hashlib, random
import numpy as np
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
seen, counts, noise = [], {"steps": 0}, np.zeros(3)
alias = model[0].weight

@dataclasses.dataclass(slots=True)
class Tally:
    num: int = 0

tally = Tally()

def head():
    return model[3]

def state():
    parts = [
        {k: v.tolist() for k, v in model.state_dict().items()},
        str(optimizer.state_dict()), scheduler.state_dict(), seen, counts, tally.num,
        noise.tolist(),
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()),
        float(X.double().sum()), [p.grad is None for p in model.parameters()],
        [p.requires_grad for p in model.parameters()], model.training,
        sorted(name for name in globals() if not name.startswith("_")),
        alias is model[0].weight is optimizer.param_groups[0]["params"][0],
        head() is model[3],
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
"""
GOES_ON = """
for epoch in range(2):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb + 0.01 * torch.randn_like(xb)), yb)
        loss.backward()
        optimizer.step()
        scheduler.step()
        seen.append(float(loss))
        counts["steps"] += 1
        tally.num += 1
        noise += np.random.rand(3)
        X.mul_(1.001)
alias.requires_grad_(False)
model.eval()
new_name = random.random()
model[3] = nn.Linear(32, 10)
del alias
"""
MAKES_ITS_OWN = """
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for xb, yb in DataLoader(train_set, batch_size=64, shuffle=True):
    optimizer.zero_grad()
    cross_entropy(model(xb), yb).backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def rig(rig2: Rig) -> Rig:
    rig2.session.execute(EARLIER)
    rig2.session.train(STEP)  # so that there is a state: Adam's, statistics, gradients
    return rig2


STEP = "optimizer.zero_grad(); cross_entropy(model(X[:64]), y[:64]).backward(); optimizer.step()"


@pytest.mark.parametrize("cell", [GOES_ON, MAKES_ITS_OWN])
def test_every_recipe_starts_from_the_same_state_and_leaves_it(rig: Rig, cell: str) -> None:
    before = rig.values("state()")
    sweep = rig.session.sweep(cell, {"compress": ["none", "fp16"]}, recipe=Recipe(batch="global"))
    again = rig.session.sweep(cell, {"compress": ["none"]}, recipe=Recipe(batch="global"))
    first, second = (row.run for row in sweep.rows)
    assert first is not None
    assert second is not None
    assert again.rows[0].run is not None
    np.testing.assert_array_equal(first.history["loss"], again.rows[0].run.history["loss"])
    np.testing.assert_allclose(first.history["loss"], second.history["loss"], rtol=1e-2)
    assert rig.values("state()") == before


def test_the_batch_size_of_an_unedited_cell_is_varied(rig: Rig) -> None:
    sweep = rig.session.sweep(MAKES_ITS_OWN, {"batch_size": [32, 128], "batch": ["rank", "global"]})
    outcomes = sweep.outcomes()
    # 1797 samples, in global batches of 64, 32, 256 and 128.
    assert [o.num_steps for o in outcomes] == [29, 57, 8, 15]
    assert [o.state for o in outcomes] == ["finished"] * 4
    assert all(o.equal_samples == pytest.approx(1797) for o in outcomes)
    assert all(o.loss_at_samples > 0 and o.sent_bytes > 0 and o.peak_gib > 0 for o in outcomes)
    run = sweep.rows[0].run
    assert run is not None
    assert any("batch size 32 in place of the written 64" in note for note in run.notes)
    written = json.loads(sweep.path.read_text())
    assert [row["num_steps"] for row in written["rows"]] == [29, 57, 8, 15]
    assert written["rows"][2]["batch_size"] == 128


def test_precision_and_accumulation_are_varied(rig: Rig) -> None:
    sweep = rig.session.sweep(MAKES_ITS_OWN, {"amp": ["off", "bf16"], "accumulate": [1, 4]})
    # 15 batches of 2 x 64.
    assert [row.label for row in sweep.rows][1:3] == ["--amp off --accumulate 4",
                                                      "--amp bf16 --accumulate 1"]  # fmt: skip
    outcomes = sweep.outcomes()
    assert [o.state for o in outcomes] == ["finished"] * 4
    assert [o.num_steps for o in outcomes] == [15, 4, 15, 4]
    runs = [row.run for row in sweep.rows if row.run is not None]
    assert not np.array_equal(runs[0].history["loss"], runs[2].history["loss"])


def test_a_batch_size_that_changes_nothing_is_said(rig: Rig) -> None:
    run = rig.session.train(STEP, recipe=Recipe(batch_size=16))
    assert any("batch size 16 changed nothing" in note for note in run.notes)


def test_a_failure_is_a_row_and_not_the_end(rig: Rig) -> None:
    before = rig.values("state()")
    cell = GOES_ON.replace("optimizer.zero_grad()", "assert rank == 0 or len(xb) < 100", 1)
    sweep = rig.session.sweep(cell, {"batch_size": [64, 128, 32]})
    assert [row.state for row in sweep.rows] == ["finished", "failed", "finished"]
    assert "rank 1: AssertionError" in sweep.rows[1].error
    assert "failed" in repr(sweep)
    assert rig.values("state()") == before


def test_a_stop_keeps_what_is_done(rig: Rig) -> None:
    before = rig.values("state()")
    cell = GOES_ON.replace("range(2)", "range(2 if len(xb0) < 100 else 10_000)")
    cell = "xb0 = next(iter(loader))[0]\n" + cell
    sweep, requests, steps = rig.session.sweeping(cell, {"batch_size": [32, 128, 64]})
    for _ in steps:
        run = dtkit.last_run
        if sweep.rows[1].state == "running" and run is not None and run.view().step > 3:
            requests.stop()
        threading.Event().wait(0.005)
    assert [row.state for row in sweep.rows] == ["finished", "stopped", "waiting"]
    assert rig.values("state()") == before
    assert json.loads(sweep.path.read_text())["rows"][0]["state"] == "finished"


def test_a_generator_that_cannot_be_put_back_is_named(rig: Rig) -> None:
    rig.session.execute("endless = iter(lambda: 1, 2); draws = (i for i in range(100))")
    sweep = rig.session.sweep(f"next(draws)\n{STEP}", {"compress": ["none", "fp16"]})
    assert any("draws" in note for note in sweep.notes)
    rig.session.execute("del draws, endless")


def test_a_run_stops_after_so_many_steps(rig: Rig) -> None:
    run = rig.session.train(MAKES_ITS_OWN, options=RunOptions(max_steps=3))
    assert (run.state, run.history.num_steps, run.error) == ("stopped", 3, None)


def test_an_axis_must_be_a_setting(rig: Rig) -> None:
    with pytest.raises(InvalidInputError, match="cannot vary 'lr'"):
        rig.session.sweep(STEP, {"lr": [0.1]})
