"""A run that goes on from a checkpoint is the one that never stopped; a failed write is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import dtkit
from dtkit.checkpoint_files import FOLDER, Manifest, whole
from dtkit.errors import InvalidInputError, RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rig import Rig

    from dtkit.driver.runs.run import Run

TOLERANCE = 1e-6
SETUP = """
import random, resource, threading, time, dtkit
from pathlib import Path
from dtkit.errors import CheckpointError
fail_at = limit_at = None

def wait_until_written():
    for thread in threading.enumerate():
        if thread.name == "dtkit-checkpoint":
            thread.join()

class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.rand(1) + 0.01 * random.random(), y

noisy_set = Noisy(X[:600], y[:600])
plain_set = TensorDataset(X[:600], y[:600])
"""
RESUME = "start = dtkit.resume(model=model, optimizer=optimizer, scheduler=scheduler)"
CELL = f"""
torch.manual_seed(0); random.seed(0)
loader = LOADER
model = nn.Sequential(
    nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
{RESUME}
losses, num_steps = [], start.step
for epoch in range(start.epoch, 4):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        num_steps += 1
        if num_steps == fail_at:
            wait_until_written()
            raise RuntimeError("the power is off")
        if rank == 1 and limit_at:
            if num_steps in (limit_at.start, limit_at.stop):
                wait_until_written()
            limit = 16_000 if num_steps in limit_at else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    scheduler.step()
state = [float(t.double().sum()) for t in model.state_dict().values()]
"""
"""Dropout, momentum, running statistics, a schedule, and random numbers for every sample."""
TWO_OPTIMIZERS = """
torch.manual_seed(0); random.seed(0)
loader = LOADER
first, second = nn.Linear(64, 32), nn.Linear(32, 10)
one = torch.optim.Adam(first.parameters(), lr=1e-3)
two = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)
start = dtkit.resume(first=first, second=second, one=one, two=two)
losses, num_steps = [], start.step

def step(optimizer, xb, yb):
    optimizer.zero_grad()
    loss = cross_entropy(second(first(xb)), yb)
    loss.backward()
    optimizer.step()
    return loss.item()

for epoch in range(start.epoch, 4):
    for xb, yb in loader:
        losses.append(step(one, xb, yb) + step(two, xb, yb))
        num_steps += 1
        if num_steps == fail_at:
            wait_until_written()
            raise RuntimeError("the power is off")
state = [float(p.double().sum()) for p in (*first.parameters(), *second.parameters())]
"""
"""Both step on each batch, as of a GAN."""
NUM_STEPS = 4 * 19
LOADERS = {
    "shuffled": "DataLoader(noisy_set, batch_size=16, shuffle=True)",
    "generator": "DataLoader(noisy_set, batch_size=16, shuffle=True, "
    "generator=torch.Generator().manual_seed(7))",
    "workers": "DataLoader(plain_set, batch_size=16, shuffle=True, num_workers=2)",
    # Not divided: every rank reads all of it, and the batches of the rank are twice as many.
    "whole": "DataLoader(noisy_set, batch_size=32)",
}


def cell(loader: str = "shuffled") -> str:
    return CELL.replace("LOADER", LOADERS[loader])


@pytest.fixture(scope="module")
def rig(rig2: Rig) -> Rig:
    """Two ranks with a data set that draws random numbers for every sample."""
    rig2.session.execute(SETUP)
    return rig2


def checkpoints(run: Run) -> list[Path]:
    return whole(run.dir / FOLDER)


def fail(rig: Rig, code: str, at: int, every: int, batch: str = "rank") -> Run:
    """Train with checkpoints until the cell fails after step `at`."""
    rig.session.execute(f"fail_at = {at}")
    with pytest.raises(RankError, match="the power is off"):
        rig.session.train(
            code, recipe=Recipe(batch=batch), options=RunOptions(checkpoint_every=every)
        )
    rig.session.execute("fail_at = None")
    run = dtkit.last_run
    assert run is not None
    return run


def assert_goes_on(rig: Rig, code: str, name: str, at: int, batch: str = "rank") -> None:
    """Assert that resuming at step `at` ends as the cell does that was never stopped."""
    results = []
    for resume in ("", name):
        options = RunOptions(resume=resume)
        run = rig.session.train(code, recipe=Recipe(batch=batch), options=options)
        results.append((rig.values("losses"), rig.values("state"), rig.common("start.step")))
    (expected, state, _), (losses, resumed_state, step) = results
    assert step == at
    assert np.shape(losses)[1] == run.view().total_steps == NUM_STEPS - at
    for rank in rig.session.ranks:
        np.testing.assert_allclose(losses[rank], expected[rank][at:], rtol=TOLERANCE)
        np.testing.assert_allclose(resumed_state[rank], state[rank], rtol=TOLERANCE)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_that_failed_goes_on_in_the_middle_of_an_epoch(rig: Rig, loader: str) -> None:
    run = fail(rig, cell(loader), at=37, every=8)
    assert [path.name for path in checkpoints(run)] == [f"step-{n:08d}" for n in (16, 24, 32)]
    assert_goes_on(rig, cell(loader), run.name, at=32)


def test_what_two_optimizers_do_with_a_batch_is_all_in_a_checkpoint(rig: Rig) -> None:
    code = TWO_OPTIMIZERS.replace("LOADER", LOADERS["shuffled"])
    run = fail(rig, code, at=12, every=5)
    assert [path.name for path in checkpoints(run)] == [f"step-{n:08d}" for n in (5, 10)]
    assert_goes_on(rig, code, run.name, at=10)


def test_a_checkpoint_at_the_end_of_an_epoch_has_what_the_cell_does_there(rig: Rig) -> None:
    run = fail(rig, cell(), at=40, every=38)
    assert Manifest.read(checkpoints(run)[-1]).epoch == 2
    assert_goes_on(rig, cell(), run.name, at=38)


def test_a_global_batch_goes_on(rig: Rig) -> None:
    code = cell().replace("batch_size=16", "batch_size=32")
    run = fail(rig, code, at=24, every=20, batch="global")
    assert_goes_on(rig, code, run.name, at=20, batch="global")


def test_an_unedited_cell_is_saved_and_can_be_resumed_by_adding_the_line(rig: Rig) -> None:
    unedited = cell().replace(RESUME, "start = dtkit.engine.checkpointing.face.Start()")
    run = fail(rig, unedited, at=24, every=20)
    assert Manifest.read(checkpoints(run)[-1]).names == ["model", "optimizer", "scheduler"]
    assert_goes_on(rig, cell(), run.name, at=20)


def test_a_run_that_was_stopped_goes_on_where_it_stopped(rig: Rig, tmp_path: Path) -> None:
    flag = tmp_path / "is-stopped"
    append = "losses.append(loss.item())\n"
    wait = (
        f"        while len(losses) == 20 and not Path({str(flag)!r}).exists(): time.sleep(0.01)\n"
    )
    options = RunOptions(checkpoint_every=1000)
    run, steps = rig.session.training(cell().replace(append, append + wait), options=options)
    for _ in steps:
        if run.requests.is_stop:  # and the ranks have been asked
            flag.touch()
        elif run.view().step > 3:
            run.stop()
        run.requests.alarm.wait(0.02)
    assert run.state == "stopped"
    (path,) = checkpoints(run)
    assert_goes_on(rig, cell(), run.name, at=Manifest.read(path).step)


def test_a_rank_whose_disk_is_full_costs_that_checkpoint_alone(rig: Rig) -> None:
    rig.session.execute("limit_at = range(8, 17)")
    options = RunOptions(checkpoint_every=5, checkpoint_keep=100)
    run = rig.session.train(cell(), options=options)
    rig.session.execute("limit_at = None")
    assert run.state == "finished"
    steps = [Manifest.read(path).step for path in checkpoints(run)]
    assert steps == [5, *range(20, NUM_STEPS, 5), NUM_STEPS]
    assert not list((run.dir / FOLDER).glob(".step*"))
    told = [note for note in run.notes if "was not written" in note]
    assert len(told) == 2
    assert "step 10" in told[0]
    assert "rank 1: OSError: [Errno 27] File too large" in told[0]
    assert "the newest whole one is step-00000005" in told[0]


def test_a_damaged_checkpoint_is_passed_over(rig: Rig) -> None:
    run = fail(rig, cell(), at=24, every=10)
    newest = checkpoints(run)[-1]
    with (newest / "rank-1.pt").open("ab") as file:
        file.write(b"x")
    assert [Manifest.read(path).step for path in checkpoints(run)] == [10]
    assert_goes_on(rig, cell(), run.name, at=10)


def test_what_cannot_be_resumed_is_said_before_the_first_step(rig: Rig) -> None:
    with pytest.raises(InvalidInputError, match=r"--resume nothing: no whole checkpoint"):
        rig.session.train(cell(), options=RunOptions(resume="nothing"))
    run = fail(rig, cell(), at=12, every=10)
    for line, message in {
        "start = dtkit.engine.checkpointing.face.Start()": "must say what is to be loaded",
        "start = dtkit.resume(net=model)": "no net in .*; it has model, optimizer, scheduler",
        "start = dtkit.resume(model=nn.Sequential(nn.Linear(64, 8)))": r"has shape \(8, 64\) here",
    }.items():
        with pytest.raises(RankError, match=message) as caught:
            rig.session.train(cell().replace(RESUME, line), options=RunOptions(resume=run.name))
        assert {f.ename for f in caught.value.causes} == {"CheckpointError"}


def test_another_number_of_ranks_loads_weights_and_says_what_is_lost(rig: Rig) -> None:
    run = fail(rig, cell(), at=12, every=10)
    resumed = rig.session.train(cell(), options=RunOptions(resume=run.name), ranks=[0])
    assert rig.values("start.step")[0] == 10
    (note,) = [note for note in resumed.notes if "resumed" in note]
    assert "on 1 ranks, written by 2" in note


def test_checkpoints_outside_a_run(rig: Rig, tmp_path: Path) -> None:
    rig.session.execute("torch.manual_seed(1); net = nn.Linear(64, 10); own = nn.Linear(3, 1)")
    rig.session.execute("own.weight.data.fill_(rank)")
    for _ in range(5):
        rig.session.execute(f"dtkit.checkpoint({str(tmp_path)!r}, net=net, own=own)")
    assert [Manifest.read(path).step for path in whole(tmp_path)] == [2, 3, 4]
    rig.session.execute(
        "before = net.weight.clone(); net.weight.data.zero_(); own.weight.data.zero_()"
    )
    rig.session.execute(f"dtkit.resume({str(tmp_path)!r}, net=net, own=own)")
    assert rig.common("bool((net.weight == before).all())")
    assert rig.values("own.weight.tolist()") == [[[0.0] * 3], [[1.0] * 3]]
    run = rig.session.train(f"start = dtkit.resume({str(tmp_path)!r}, net=net, own=own)")
    assert rig.common("start.step") == 4
    assert any("written outside of a run: weights" in note for note in run.notes)
    with pytest.raises(RankError, match="outside a run name a folder and objects"):
        rig.session.execute("dtkit.checkpoint(net=net)")


@pytest.fixture
def folders(rig: Rig, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """What `ckpt` is on rank 0 and on rank 1, as if each host had a disk of its own."""
    save = f"dtkit.checkpoint({str(tmp_path / 'ckpt')!r}, net=net)"
    rig.session.execute("import os; before = os.getcwd(); net = nn.Linear(64, 10)")
    for _ in range(2):
        rig.session.execute(f"net.weight.data.add_(1); {save}")
    places = []
    for rank in rig.session.ranks:
        places.append(tmp_path / f"host-{rank}" / "ckpt")
        places[rank].mkdir(parents=True)
        for path in whole(tmp_path / "ckpt"):
            (places[rank] / path.name).symlink_to(path)
    rig.session.execute(f"os.chdir({str(tmp_path)!r} + f'/host-{{rank}}')")
    yield places[0], places[1]
    rig.session.execute("os.chdir(before)")


def test_all_ranks_load_the_newest_that_the_first_one_sees(
    rig: Rig, folders: tuple[Path, Path]
) -> None:
    (folders[0] / "step-00000001").unlink()  # still being written, as far as rank 0 knows
    rig.session.execute("start = dtkit.resume('ckpt', net=net)")
    assert rig.common("start.path.name, start.step") == ("step-00000000", 0)
    rig.assert_same_weights("net")
    rig.session.execute("start = dtkit.resume('ckpt', net=net)", ranks=[1])
    assert rig.values("start.step") == [0, 1]


def test_what_a_rank_cannot_load_is_an_error_on_all(rig: Rig, folders: tuple[Path, Path]) -> None:
    other = folders[1] / "step-00000001"
    rig.session.execute("apart = nn.Linear(64 + rank, 10)")
    cases = {
        "ckpt": ("net", "rank 1: ckpt/step-00000001/checkpoint.json is not on "),
        "ckpt/step-00000000": ("apart", r"rank 1: net.weight has shape \(10, 65\) here"),
        "ckpt/step-00000001": ("net", "step-00000001 is not the same on all ranks"),
    }
    for path, (name, message) in cases.items():
        other.unlink(missing_ok=True)
        if path == "ckpt/step-00000001":
            other.symlink_to(folders[1] / "step-00000000")
        with pytest.raises(RankError, match=message) as caught:
            rig.session.execute(f"dtkit.resume({path!r}, net={name})")
        assert [f.ename for f in caught.value.causes] == ["CheckpointError"] * 2


def test_a_checkpoint_that_is_being_written_is_waited_for(rig: Rig) -> None:
    run = rig.session.train(
        "model = nn.Linear(64, 10)\n"
        "pending = dtkit.checkpoint(model=model)\n"
        "start = dtkit.resume(pending.path.parent, model=model)"
    )
    assert rig.common("start.path == pending.path")
    assert checkpoints(run)[-1].name == "step-00000000"
