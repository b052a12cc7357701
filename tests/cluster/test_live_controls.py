"""Live controls: changed while a run goes on, on all ranks from the same step on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dtkit.driver.waiting import drive
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rig import Rig

    from dtkit.driver.runs.run import Run

CELL = """
import dtkit
model = nn.Linear(64, 10)
opt = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.4}], lr=0.2)
schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step / 50))
loader = DataLoader(train_set, batch_size=32, shuffle=True)
written, noises = [], []
for epoch in range(100):
    for xb, yb in loader:
        noise = dtkit.control("noise", 0.0, high=1.0)
        noises.append(noise)
        loss = cross_entropy(model(xb + noise * torch.rand_like(xb)), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        written.append([group["lr"] for group in opt.param_groups])
"""


def until(run: Run, is_so: Callable[[Run], bool]) -> Callable[[Iterator[None]], None]:
    """Return what goes on with a run's steps until something is so, for half a minute."""

    def go_on(steps: Iterator[None]) -> None:
        end_s = time.monotonic() + 30
        for _ in steps:
            run.requests.alarm.wait(0.02)
            if is_so(run):
                return
            assert time.monotonic() < end_s, run.view()
        pytest.fail(f"the run is over: {run}")

    return go_on


def train(rig: Rig, script: Callable[[Run, Callable[..., None]], None], **recipe: Any) -> Run:
    """Train the cell, let `script` do something to the run, stop it."""
    run, steps = rig.session.training(CELL, recipe=Recipe(**recipe))

    def wait(is_so: Callable[[Run], bool]) -> None:
        until(run, is_so)(steps)

    wait(lambda r: r.view().step >= 3 and "noise" in r.controls)
    script(run, wait)
    run.stop()
    drive(steps, run.requests)
    assert run.state == "stopped"
    return run


@pytest.mark.parametrize(
    "recipe",
    [{}, {"accumulate": 3}, {"strategy": "local-sgd:4"}, {"manual": True}, {"amp": "bf16"}],
    ids=lambda r: next(iter(r), "plain"),
)
def test_all_ranks_take_a_value_from_the_same_step_on(rig2: Rig, recipe: dict[str, Any]) -> None:
    def script(_run: Run, wait: Callable[..., None]) -> None:
        rig2.session.set_controls(lr_factor=0.5, noise=0.25)
        wait(lambda r: r.changes)
        wait(lambda r: r.view().step > r.changes[0].step + 3)

    run = train(rig2, script, **recipe)
    (change,) = run.changes
    assert change.values == {"lr_factor": 0.5, "noise": 0.25}
    firsts = rig2.values("noises.index(0.25)")
    assert firsts[0] == firsts[1]
    assert rig2.values("set(noises)") == [{0.0, 0.25}] * 2
    # The schedule saw nothing of it, in either group.
    for written in rig2.values("written"):
        decay = 1 / (1 + np.arange(1, len(written) + 1) / 50)
        if "accumulate" not in recipe:  # there the schedule is held with the steps
            assert np.allclose(written, np.stack([0.2 * decay, 0.4 * decay], axis=1))
    lr, steps = run.history["lr"], run.history["step"]
    if "accumulate" not in recipe:
        own = 0.2 / (1 + (steps - 1) / 50)
        assert np.allclose(lr / own, np.where(steps > change.step, 0.5, 1.0))
        assert firsts[0] == change.step
    assert run.history["lr_factor"].tolist() == np.where(steps > change.step, 0.5, 1.0).tolist()
    assert run.history["noise"].tolist() == np.where(steps > change.step, 0.25, 0.0).tolist()


def test_the_step_is_made_with_the_learning_rate_that_was_asked_for(rig2: Rig) -> None:
    """A factor of 0 holds the weights still, and what the optimizer remembers goes on."""

    def script(run: Run, wait: Callable[..., None]) -> None:
        run.set_controls(lr=0.01)
        wait(lambda r: r.changes)
        wait(lambda r: r.view().step > r.changes[0].step + 1)
        run.set_controls(lr_factor=0)
        wait(lambda r: len(r.changes) == 2)
        wait(lambda r: r.view().step > r.changes[1].step + 20)

    run = train(rig2, script)
    first, second = run.changes
    lr = dict(zip(run.history["step"], run.history["lr"], strict=True))
    assert lr[first.step + 1] == pytest.approx(0.01)
    assert lr[second.step + 1] == 0
    assert rig2.session.check(["model"]).is_equal
