"""Live controls: changed while a run goes on, on all ranks from the same step on."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dtkit.driver.runs.asked import ask
from dtkit.driver.runs.run import Run
from dtkit.driver.waiting import drive
from dtkit.errors import InvalidInputError, RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rig import Rig

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
    """Return what goes on with a run's steps until something is so, for a minute."""

    def go_on(steps: Iterator[None]) -> None:
        end_s = time.monotonic() + 60
        for _ in steps:
            run.requests.alarm.wait(0.02)
            if is_so(run):
                return
            assert time.monotonic() < end_s, run.view()
        pytest.fail(f"the run is over: {run}")

    return go_on


def train(
    rig: Rig,
    script: Callable[[Run, Callable[..., None]], None],
    *,
    cell: str = CELL,
    options: RunOptions | None = None,
    **recipe: Any,
) -> Run:
    """Train the cell, let `script` do something to the run, stop it."""
    run, steps = rig.session.training(cell, recipe=Recipe(**recipe), options=options)

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


def test_free_ranks_take_a_value_each_at_its_own_step(rig2: Rig) -> None:
    def script(run: Run, wait: Callable[..., None]) -> None:
        run.set_controls(noise=0.25)
        wait(lambda r: r.changes)
        wait(lambda r: r.view().step > r.changes[0].step + 20)

    run = train(rig2, script, strategy="async:8")
    assert rig2.values("set(noises)") == [{0.0, 0.25}] * 2
    assert set(run.history["noise"]) == {0.0, 0.25}


def test_a_paused_run_and_another_kernel_are_served(rig2: Rig) -> None:
    def script(run: Run, wait: Callable[..., None]) -> None:
        run.pause()
        wait(lambda r: r.view().state == "paused")
        run.set_controls(noise=0.25)
        wait(lambda r: r.changes)
        assert run.view().state == "paused"
        assert run.view().step <= run.changes[0].step
        run.pause(is_paused=False)
        ask(run.dir, {"noise": 0.5})
        ask(run.dir, {"noise": "loud"})
        with (run.dir / "controls.jsonl").open("a") as file:
            file.write("no JSON\n")
        wait(lambda r: len(r.changes) == 2 and any("in vain" in note for note in r.notes))

    run = train(rig2, script)
    assert [change.values for change in run.changes] == [{"noise": 0.25}, {"noise": 0.5}]
    (note,) = (note for note in run.notes if "in vain" in note)
    assert "'loud' is not what it takes: a number to 1" in note
    again = Run.load(run.dir)
    assert again.changes == run.changes
    assert np.array_equal(again.history["noise"], run.history["noise"])
    with pytest.raises(InvalidInputError, match=r"has ended \(stopped\)"):
        run.set_controls(noise=0)
    with pytest.raises(InvalidInputError, match="nothing trains"):
        rig2.session.set_controls(noise=0)


def test_a_resumed_run_goes_on_with_what_its_checkpoint_was_trained_with(rig2: Rig) -> None:
    cell = CELL.replace("written, noises", "dtkit.resume(model=model, opt=opt)\nwritten, noises")
    options = RunOptions(checkpoint_every=5)

    def script(run: Run, wait: Callable[..., None]) -> None:
        run.set_controls(noise=0.25, lr_factor=0.5)
        wait(lambda r: r.changes and r.view().step > r.changes[0].step + 12)

    first = train(rig2, script, cell=cell, options=options)
    options = RunOptions(resume=first.name)
    second = train(rig2, lambda _run, wait: wait(lambda r: r.changes), cell=cell, options=options)
    assert second.changes[0].values == {"noise": 0.25, "lr_factor": 0.5}
    assert set(second.history["lr_factor"]) == {0.5}
    assert rig2.values("set(noises)") == [{0.25}] * 2


def test_a_rank_that_is_stopped_keeps_the_others_as_they_were(rig2: Rig) -> None:
    pid = rig2.values("__import__('os').getpid()")[1]

    def script(run: Run, wait: Callable[..., None]) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            run.set_controls(noise=0.25)
            wait(lambda r: any("did not answer" in note for note in r.notes))
        finally:
            os.kill(pid, signal.SIGCONT)
        step = run.view().step
        wait(lambda r: r.view().step > step + 5)

    run = train(rig2, script)
    assert not run.changes
    assert rig2.values("set(noises)") == [{0.0}] * 2


def test_a_rank_that_dies_meanwhile_fails_the_run_and_hangs_nobody(
    rig2: Rig, owned_pids: set[int]
) -> None:
    run, steps = rig2.session.training(CELL)
    until(run, lambda r: r.view().step >= 3)(steps)
    pid = next(rank.pid for rank in run.view().ranks if rank.rank == 1)
    run.set_controls(noise=0.25)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankError):
        drive(steps, run.requests)
    rig2.session.restart()
    owned_pids.update(rig2.session.pids())
