"""What a run leaves behind, looked at: history, TensorBoard, timeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dtkit
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from pathlib import Path

    from rig import Rig

CELL = """
import dtkit
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in loader:
    optimizer.zero_grad()
    loss = cross_entropy(model(xb), yb)
    loss.backward()
    optimizer.step()
    dtkit.log(doubled=2.0)
"""


def test_a_run_is_read_back_in_another_process(rig2: Rig) -> None:
    run = rig2.session.train(CELL, name="kept")
    assert dtkit.runs()["kept"] is run
    code = (
        "import dtkit, numpy, sys\n"
        "run = dtkit.runs(sys.argv[1])['kept']\n"
        "assert run.state == 'finished' and run.environment['world_size'] == 2\n"
        "assert any('averaged' in note for note in run.notes)\n"
        "numpy.save(sys.argv[2], run.history['loss'])\n"
        "assert '<img' in run._repr_mimebundle_()['text/html']\n"
        "assert 'torch' not in sys.modules\n"
    )
    out = run.dir / "loss.npy"
    subprocess.run([sys.executable, "-c", code, str(run.dir.parent), str(out)], check=True)
    np.testing.assert_array_equal(np.load(out), run.history["loss"])


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return a curve of the only event file in a folder, as TensorBoard reads it."""
    (path,) = folder.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(path), size_guidance={"scalars": 0})
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(tag)]


def test_a_run_is_written_for_tensorboard_once(rig2: Rig) -> None:
    run = rig2.session.train(CELL, options=RunOptions(tensorboard=""), name="board")
    loss = scalars(run.dir / "tensorboard", "train/loss")
    np.testing.assert_allclose([v for _, v in loss], run.history["loss"], rtol=1e-6)
    norms = scalars(run.dir / "tensorboard", "train/grad_norm")
    assert len(norms) == run.history.num_steps
    # The last step's gradients are still there: averaged, hence alike on both ranks.
    norm = "torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()"
    assert norms[-1][1] == pytest.approx(rig2.common(norm), rel=1e-5)


WRITING = """
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter(FOLDER)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    optimizer.zero_grad()
    loss = cross_entropy(model(X[:64]), y[:64])
    loss.backward()
    optimizer.step()
    writer.add_scalar('Loss/train', loss.item(), global_step=step)
writer.add_image('image', torch.zeros(3, 8, 8))
writer.add_histogram('weights', model.weight, 5)
writer.add_hparams({'lr': 0.1}, {'loss': 1.0}, run_name='.')
writer.flush()
writer.close()
"""


def test_a_cells_own_writer_gives_one_curve(rig2: Rig, tmp_path: Path) -> None:
    cell = WRITING.replace("FOLDER", repr(str(tmp_path / "logs")))
    rig2.train(cell, "rank")
    paths = sorted(
        (tmp_path / "logs").glob("events.out.tfevents.*"), key=lambda p: p.stat().st_size
    )
    assert len(paths) == 2  # add_hparams writes a file of its own
    reader = EventAccumulator(str(paths[-1]))
    reader.Reload()
    assert [point.step for point in reader.Scalars("Loss/train")] == [0, 1, 2, 3, 4]
    assert reader.Tags()["images"] == ["image"]
    assert reader.Tags()["histograms"] == ["weights"]
    rig2.session.execute("writer.add_scalar('after', 1.0); writer.close()", ranks=[1])


def test_every_rank_writes_when_asked(rig2: Rig, tmp_path: Path) -> None:
    cell = WRITING.replace("FOLDER", f"{str(tmp_path)!r} + f'/rank{{rank}}'")
    rig2.session.train(cell, options=RunOptions(writers="all"))
    for rank in rig2.session.ranks:
        assert list((tmp_path / f"rank{rank}").glob("events.out.tfevents.*"))


def test_tensorboard_runs_on_loopback_and_ends_with_its_owner(
    rig2: Rig, owned_pids: set[int]
) -> None:
    board = rig2.session.tensorboard()
    owned_pids.add(board.pid)
    try:
        assert rig2.session.tensorboard().pid == board.pid
        assert os.getpgid(board.pid) != os.getpgrp()
        with urllib.request.urlopen(f"http://127.0.0.1:{board.port}/data/runs") as answer:
            assert "board/tensorboard" in json.load(answer)
        listening = [c for c in psutil.Process(board.pid).net_connections() if c.status == "LISTEN"]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
        assert f"http://127.0.0.1:{board.port}/" in board._repr_html_()
    finally:
        board.close()
        owned_pids.discard(board.pid)
    assert not psutil.pid_exists(board.pid)
