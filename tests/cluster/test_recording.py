"""What a run records by itself, and how it is stopped and paused."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rig import hold

from dtkit.errors import RankError
from dtkit.events import RankEnded, StepBatch, decode
from dtkit.options import RunOptions
from dtkit.telemetry import RunState

if TYPE_CHECKING:
    from rig import Rig

    from dtkit.driver.runs.run import Run

LOOP = """
import dtkit
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
num_steps = 0
for epoch in range(EPOCHS):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        num_steps += 1
        dtkit.log(doubled=2 * num_steps, rank_plus=float(loss.isfinite()))
"""
TORCH_ATTRIBUTES = (
    "[torch.autograd.backward, torch.save, DataLoader.__iter__, DataLoader.__len__, "
    "torch.optim.Optimizer.__init__, torch.optim.Optimizer.zero_grad, "
    "torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_, "
    "torch.nn.utils.clip_grad._get_total_norm, torch.amp.GradScaler.step, "
    "torch.nn.parallel.DistributedDataParallel.__init__]"
)


def loop(epochs: int) -> str:
    return LOOP.replace("EPOCHS", str(epochs))


def wait_for_step(run: Run, steps: Any, number: int) -> None:
    """Drive the run on until it has made some steps."""
    for _ in steps:
        if run.view().step >= number:
            return
        threading.Event().wait(0.01)
    pytest.fail(f"the run ended before step {number}")


def drive(steps: Any) -> None:
    """Drive the run to its end."""
    for _ in steps:
        threading.Event().wait(0.01)


def test_steps_samples_and_metrics_add_up(rig2: Rig) -> None:
    run = rig2.train(loop(2), batch="rank")
    history = run.history
    assert history.num_steps == rig2.common("num_steps") == 30
    assert run._state.num_samples == 2 * 1797
    np.testing.assert_array_equal(history["doubled"], 2 * np.arange(1, 31))
    np.testing.assert_array_equal(history["lr"], 0.1)
    parts = history["compute_ms"] + history["data_ms"] + history["comm_ms"]
    np.testing.assert_allclose(parts, history["step_ms"])
    assert np.all(np.diff(history["time_s"]) > 0)
    view = run.view()
    assert view.total_steps == 30
    assert view.peak_gib > 0.05
    assert {rank.state for rank in view.ranks} == {"finished"}


def test_the_files_of_the_ranks_hold_the_same_history(rig2: Rig) -> None:
    run = rig2.train(loop(1))
    again = RunState(run.name, run.ranks)
    for rank in run.ranks:
        lines = (run.dir / f"rank-{rank}.jsonl").read_bytes().splitlines()
        events = [decode(line) for line in lines]
        assert isinstance(events[-1], RankEnded)
        assert any(isinstance(event, StepBatch) for event in events)
        for event in events:
            again.handle(event)
    for name, column in run.history.items():
        np.testing.assert_array_equal(again.history()[name], column)


def test_waiting_for_data_is_measured(rig2: Rig) -> None:
    cell = """
import time
class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        global took_s
        begun = time.perf_counter()
        time.sleep(0.01)  # the workload: a disk that is slow, and counts how slow it was
        took_s += time.perf_counter() - begun
        return X[i], y[i]
took_s = 0.0
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in DataLoader(Slow(), batch_size=4, shuffle=True):
    optimizer.zero_grad()
    cross_entropy(model(xb), yb).backward()
    optimizer.step()
"""
    data_ms = rig2.train(cell, batch="rank").history["data_ms"]
    planted_ms = 1000 * np.mean(rig2.values("took_s"))
    assert planted_ms >= 20 * 10
    assert np.sum(data_ms) == pytest.approx(planted_ms, rel=0.2)


def test_a_loss_that_is_not_finite_is_recorded_as_it_is(rig2: Rig) -> None:
    cell = """
model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for value in (1.0, float('inf'), float('nan'), 2.0):
    optimizer.zero_grad()
    (model(torch.ones(4, 1)) * 0 + value).mean().backward()
    optimizer.step()
"""
    loss = rig2.train(cell).history["loss"]
    assert list(np.isnan(loss)) == [False, False, True, False]
    assert np.isinf(loss[1])


def test_a_run_that_cannot_begin_leaves_no_thread(rig2: Rig) -> None:
    class WithoutPart(RunOptions):
        def parts(self) -> list[tuple[str, dict[str, Any]]]:
            return [("dtkit.engine.nowhere:make", {})]

    with pytest.raises(RankError, match="nowhere"):
        rig2.train(loop(1), options=WithoutPart())
    threads = "[t.name for t in __import__('threading').enumerate()]"
    assert all("dtkit-recorder" not in names for names in rig2.values(threads))


def test_nothing_stays_patched(rig2: Rig) -> None:
    rig2.session.execute(f"before = {TORCH_ATTRIBUTES}")
    unchanged = f"all(a is b for a, b in zip(before, {TORCH_ATTRIBUTES}))"
    rig2.train(loop(1))
    assert rig2.common(unchanged)
    for broken in (loop(1) + "\n1 / 0\n", "x = = 1\n"):
        with pytest.raises(RankError):
            rig2.train(broken)
        assert rig2.common(unchanged)
    run, steps = rig2.session.training(loop(10_000))
    wait_for_step(run, steps, 5)
    run.stop()
    drive(steps)
    assert rig2.common(unchanged)
    hooks = "sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())"
    assert rig2.common(hooks) == 0


def test_all_ranks_stop_after_the_same_step(rig2: Rig) -> None:
    run, steps = rig2.session.training(loop(10_000))
    wait_for_step(run, steps, 10)
    run.stop()
    drive(steps)
    assert (run.state, run.error) == ("stopped", None)
    stopped_at = rig2.common("num_steps")
    assert run.history.num_steps == stopped_at >= 10
    rig2.assert_same_weights("model")
    assert rig2.train(loop(1)).state == "finished"


def test_a_pause_changes_nothing_but_the_time(rig2: Rig) -> None:
    expected = rig2.train(loop(20), batch="rank").history["loss"]
    run, steps = rig2.session.training(loop(20))
    wait_for_step(run, steps, 5)
    run.pause()
    for _ in steps:
        if run.view().state == "paused":
            break
        threading.Event().wait(0.01)
    paused_s = hold(run, steps)
    assert run.view().step < 300
    run.pause(is_paused=False)
    drive(steps)
    assert run.state == "finished"
    assert np.diff(run.history["time_s"]).max() >= paused_s / 2
    np.testing.assert_allclose(run.history["loss"], expected, rtol=1e-5)


def test_a_paused_run_can_be_stopped(rig2: Rig) -> None:
    run, steps = rig2.session.training(loop(10_000))
    wait_for_step(run, steps, 5)
    run.pause()
    for _ in steps:
        if run.view().state == "paused":
            break
        threading.Event().wait(0.01)
    run.stop()
    drive(steps)
    assert run.state == "stopped"
    assert run.history.num_steps == rig2.common("num_steps")


def test_one_stop_is_enough_when_a_rank_has_made_fewer_steps(rig2: Rig) -> None:
    run, steps = rig2.session.training(LOOP.replace("EPOCHS", "1 + (rank == 0)"))
    for _ in steps:
        if run.view().ranks[1].state == "finished" and not run.requests.is_stop:
            run.stop()
        threading.Event().wait(0.01)
    assert run.state == "stopped"
    assert rig2.values("num_steps") == [15, 15]
    assert rig2.common("dist.all_reduce(t := torch.ones(1)); t.item()") == 2.0
