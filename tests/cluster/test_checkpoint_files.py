"""What is on the disk when a process is killed while it writes; and nothing there runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dtkit
from dtkit.checkpoint_files import whole
from dtkit.engine.checkpointing.pending import Pending
from dtkit.engine.checkpointing.ranks import Ranks
from dtkit.engine.checkpointing.read import _Unpickler
from dtkit.engine.checkpointing.write import Writer
from dtkit.errors import CheckpointError

KILLED = """
import os, signal, sys
import dtkit, torch

model = torch.nn.Linear(4, 1)
model.weight.data.fill_(1.0)
dtkit.checkpoint(sys.argv[1], model=model)
model.weight.data.fill_(2.0)
fsync, num_left = os.fsync, int(sys.argv[2])

def killing(descriptor):
    global num_left
    num_left -= 1
    if num_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = killing
dtkit.checkpoint(sys.argv[1], model=model)
"""
"""Writes a checkpoint, and is killed at a call of fsync while it writes the next."""


@pytest.mark.parametrize(
    ("num_syncs", "step"),
    [(0, 0), (3, 0), (5, 1)],
    ids=["tensors", "manifest", "renamed"],
)
def test_a_process_that_is_killed_while_it_writes(
    tmp_path: Path, num_syncs: int, step: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(num_syncs)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    model = torch.nn.Linear(4, 1)
    start = dtkit.resume(tmp_path, model=model)
    assert start.step == step
    assert start.path == whole(tmp_path)[-1]
    assert model.weight.tolist() == [[step + 1.0] * 4]


def test_a_disk_that_is_full_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(4, 1)
    dtkit.checkpoint(tmp_path, model=model)

    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step 1 .* rank 0: .*No space left on device"):
        dtkit.checkpoint(tmp_path, model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_an_old_one_that_cannot_be_removed_is_no_failure_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, parts = Writer(tmp_path, 1, Ranks(None), lambda _: None), {"m": torch.nn.Linear(4, 1)}
    writer.save(parts, {}, step=1, epoch=0).wait()

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, os.strerror(16), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    pending = writer.save(parts, {}, step=2, epoch=0)
    with pytest.raises(CheckpointError, match=r"step 2 was written, but an older one .* busy"):
        pending.wait()
    assert whole(tmp_path) == [pending.path]


def test_an_index_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    path = dtkit.checkpoint(tmp_path, model=model).path

    class Evil:
        def __reduce__(self) -> object:
            return os.system, ("touch " + str(tmp_path / "owned"),)

    evil = pickle.dumps(Evil())
    (path / ".metadata").write_bytes(evil)
    # Whoever can write there makes the sizes agree.
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"][".metadata"] = len(evil)
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        dtkit.resume(tmp_path, model=model)
    assert not (tmp_path / "owned").exists()


class Named(NamedTuple):
    """What `weights_only` does not know."""

    number: int


@pytest.mark.parametrize("value", [Path("x"), Named(1)], ids=["path", "named tuple"])
def test_a_value_that_cannot_be_loaded_safely_is_refused_when_it_is_saved(
    tmp_path: Path, value: object
) -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"value": value}

    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        dtkit.checkpoint(tmp_path, odd=Odd())


def test_an_index_of_another_python_is_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    path = dtkit.checkpoint(tmp_path, model=model).path / ".metadata"
    index = path.read_bytes()
    moved = b"pathlib._local"  # where 3.13 has it, and only that
    assert index.count(b"\x8c\x07pathlib") == 1
    changed = index.replace(b"\x8c\x07pathlib", b"\x8c\x0e" + moved)
    frame = changed.index(b"\x95") + 1
    assert _Unpickler(
        io.BytesIO(
            changed[:frame]
            + (int.from_bytes(changed[frame : frame + 8], "little") + len(moved) - 7).to_bytes(
                8, "little"
            )
            + changed[frame + 8 :]
        )
    ).load()


def test_what_a_failed_write_says_is_said_before_who_waits_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Pending] = []
    writer = Writer(tmp_path, 3, Ranks(None), told.append)

    def done(ended: Pending) -> None:
        assert told == [ended]

    monkeypatch.setattr(Pending, "done", done)
    pending = writer.save({"model": torch.nn.Linear(4, 1)}, {}, step=1, epoch=0)
    for thread in threading.enumerate():
        if thread.name == "dtkit-checkpoint":
            thread.join()
    assert told == [pending]


@pytest.mark.usefixtures("digits")  # an optimizer's first step sets a variable of torch's compiler
def test_every_kind_of_state_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    model.half_buffer = torch.nn.Buffer(torch.empty(0, dtype=torch.float16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    model(torch.randn(8, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    scheduler.step()
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "steps": steps}
    dtkit.checkpoint(tmp_path, **objects)
    saved = {name: repr(thing.state_dict()) for name, thing in objects.items()}

    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    other.half_buffer = torch.nn.Buffer(torch.empty(0, dtype=torch.float16))
    fresh = torch.optim.AdamW(other.parameters(), lr=5.0, amsgrad=True)
    loaded = {
        "model": other,
        "optimizer": fresh,
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(fresh, max_lr=3.0, total_steps=5),
        "steps": torch.optim.lr_scheduler.MultiStepLR(fresh, [1]),
    }
    dtkit.resume(tmp_path, **loaded)
    assert {name: repr(thing.state_dict()) for name, thing in loaded.items()} == saved
