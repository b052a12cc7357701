"""The largest batch that fits on all ranks, the learning rates that train; nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dtkit.driver.trials.tune import BatchTuning, LrTuning, TrialOptions, TuneSettings
from dtkit.errors import InvalidInputError, RankError
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

    from dtkit import Session

EARLIER = """
torch.manual_seed(0)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(train_set, batch_size=64, shuffle=True)

def state():
    rng = torch.get_rng_state().sum().item()
    return [model.weight.double().sum().item(), str(optimizer.state_dict()), rng]
"""
CELL = """
for epoch in range(EPOCHS):
    for xb, yb in loader:
        optimizer.zero_grad()
        hidden = torch.zeros(len(xb), FEATURES)
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
"""
MIB = 2**20


def cell(features: str = "1", epochs: int = 4) -> str:
    return CELL.replace("FEATURES", features).replace("EPOCHS", str(epochs))


def batch_tuning(session: Session, text: str, settings: TuneSettings) -> BatchTuning:
    tuning = session.tune(text, "batch", settings=settings)
    assert isinstance(tuning, BatchTuning)
    return tuning


@pytest.fixture(scope="module")
def rig(rig2: Rig) -> Rig:
    rig2.session.execute(EARLIER)
    rig2.session.train(cell(epochs=1))
    return rig2


@pytest.mark.parametrize("where", ["FEATURES", "FEATURES if rank == 1 else 1"])
def test_out_of_memory_on_any_rank_is_agreed_on_by_all(rig: Rig, where: str) -> None:
    """A sample takes 1 MiB: of 40 MiB, and what an earlier cell has freed, 48 cannot fit."""
    before = rig.values("state()")
    settings = TuneSettings(first_batch=8, memory_bytes=40 * MIB, num_steps=4)
    tuning = batch_tuning(rig.session, cell(where.replace("FEATURES", "2**18")), settings)
    states = {t.batch_size: t.state for t in tuning.trials}
    assert states[8] == "fits"
    assert "out of memory" in states.values()
    assert tuning.largest is not None
    assert 8 <= tuning.largest < 48
    smallest_that_fails = min(b for b, state in states.items() if state == "out of memory")
    assert smallest_that_fails - tuning.largest <= max(1, tuning.largest // 8)
    assert "the largest that fits" in repr(tuning)
    assert rig.values("state()") == before
    limit = "__import__('resource').getrlimit(__import__('resource').RLIMIT_DATA)[0]"
    assert rig.common(limit) == -1


def test_it_ends_where_the_data_end(rig: Rig) -> None:
    settings = TuneSettings(first_batch=256, num_steps=4)
    tuning = batch_tuning(rig.session, cell(), settings)
    # 1797 samples are less than two ranks' 1024.
    assert [t.state for t in tuning.trials] == ["fits", "fits", "more than the data"]
    assert tuning.largest == 512
    assert tuning.knee in (256, 512)
    assert "alt=" in tuning._repr_mimebundle_()["text/html"]


def test_it_ends_at_the_most_that_was_asked_for(rig: Rig) -> None:
    settings = TuneSettings(first_batch=16, most_batch=32, num_steps=4)
    assert batch_tuning(rig.session, cell(), settings).largest == 32


def test_a_cell_that_fails_says_why(rig: Rig) -> None:
    tuning = batch_tuning(rig.session, "1 / 0", TuneSettings())
    assert (tuning.largest, tuning.knee) == (None, None)
    assert "ZeroDivisionError" in tuning.proposal()
    with pytest.raises(RankError, match="ZeroDivisionError"):
        rig.session.tune("1 / 0", "lr")


def test_the_range_of_learning_rates_is_gone_through(rig: Rig) -> None:
    before = rig.values("state()")
    fresh = EARLIER.split("\n\n", maxsplit=1)[0].replace("lr=0.1", "lr=123.0") + cell(epochs=10)
    tuning = rig.session.tune(fresh, "lr", settings=TuneSettings(low=1e-4, high=1e3, num_steps=80))
    assert isinstance(tuning, LrTuning)
    np.testing.assert_allclose(tuning.lr, np.geomspace(1e-4, 1e3, 80), rtol=1e-6)
    assert 1e-3 < tuning.steepest < 10
    assert tuning.diverges > tuning.steepest
    assert "the loss falls fastest" in tuning.proposal()
    assert rig.values("state()") == before


def test_the_rate_that_is_recorded_is_the_one_that_was_used(rig: Rig) -> None:
    """Also while the user has the control `lr_factor` elsewhere than at 1."""
    begin = """
from dtkit.engine.process.agent import agent
agent().run.stepping.lr.value = 0.5
used = []
optimizer.register_step_pre_hook(lambda made, *_: used.append(made.param_groups[0]["lr"]))
"""
    options = TrialOptions(max_steps=10, lr_range=(1e-3, 1.0))
    run = rig.session.train(begin + cell(epochs=1), options=options)
    used = rig.common("used")
    np.testing.assert_allclose(used, 0.5 * np.geomspace(1e-3, 1.0, 10), rtol=1e-6)
    np.testing.assert_allclose(run.history["lr"], used, rtol=1e-6)


def test_a_short_cell_goes_through_the_whole_range(rig: Rig) -> None:
    tuning = rig.session.tune(cell(epochs=1), "lr", settings=TuneSettings(low=1e-4, high=1.0))
    assert isinstance(tuning, LrTuning)
    np.testing.assert_allclose(tuning.lr, np.geomspace(1e-4, 1.0, 15), rtol=1e-6)
    assert any("15 steps" in note for note in tuning.notes)


def test_a_global_batch_is_that_of_all_ranks(rig: Rig) -> None:
    settings = TuneSettings(first_batch=1024, num_steps=4)
    tuning = rig.session.tune(cell(), "batch", settings=settings, recipe=Recipe(batch="global"))
    assert isinstance(tuning, BatchTuning)
    assert [t.state for t in tuning.trials] == ["fits", "more than the data"]


def test_what_does_not_exist_is_refused(rig: Rig) -> None:
    with pytest.raises(InvalidInputError, match="choose one of batch, lr"):
        rig.session.tune(cell(), "momentum")
