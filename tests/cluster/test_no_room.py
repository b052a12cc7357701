"""Memory and disk that really run out: a control group of little memory, a small file system."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_BYTES = 3 * 2**30
OUT_OF_MEMORY = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
import dtkit
from dtkit.errors import RankError

with dtkit.Session.start(2, devices="cpu", runs_dir=sys.argv[2]) as session:
    session.execute("import torch; kept = rank")
    try:
        session.execute(
            "held = [torch.ones(2**24) for _ in range(999) if rank == 1]\\ndist.barrier()"
        )
    except RankError as error:
        print(error)
    print("kept:", session.execute("kept", ranks=[0]).results)
    print(session.restart(refill=True))
"""

FULL_DISK = """
import sys
from pathlib import Path
import dtkit
from dtkit.options import RunOptions

CELL = '''
import dtkit, torch
model = torch.nn.Linear(1000, 250)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(8):
    if i == 3:
        dtkit.checkpoint(model=model).wait()
        fill()
        dist.barrier()
    optimizer.zero_grad()
    model(torch.ones(4, 1000)).square().mean().backward()
    optimizer.step()
'''
SETUP = '''
from pathlib import Path
folder = Path({!r})
def fill():
    if rank == 0:
        try:
            (folder / "other").write_bytes(bytes(40_000_000))
        except OSError:
            pass
'''
with dtkit.Session.start(2, devices="cpu", runs_dir=sys.argv[1]) as session:
    session.execute(SETUP.format(sys.argv[1]))
    run = session.train(CELL, options=RunOptions(checkpoint_every=2))
    print(run.state, *run.notes, sep="\\n")
    print(sorted(path.name for path in (run.dir / "checkpoints").iterdir()))
    session.execute("(folder / 'other').unlink() if rank == 0 else None")
    resumed = session.train(
        "import torch\\nmodel = torch.nn.Linear(1000, 250)\\nstart = dtkit.resume(model=model)\\n"
        "print('from step', start.step)".replace("import torch", "import torch, dtkit", 1),
        options=RunOptions(resume=run.name),
    )
    print(resumed.output.text_of(0))
"""


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of its own; skips where none can be made."""
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {controllers: path.lstrip("/") for _, controllers, path in rows}
    if "memory" in paths:
        parent, limit = Path("/sys/fs/cgroup/memory") / paths["memory"], "memory.limit_in_bytes"
    else:
        parent, limit = Path("/sys/fs/cgroup") / paths.get("", ""), "memory.max"
    group = parent / f"dtkit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a limit of memory can be made here: {error}")
    yield group / "cgroup.procs"
    group.rmdir()


def test_a_rank_that_the_system_kills_for_its_memory_is_named_so(
    little_memory: Path,
    tmp_path: Path,
) -> None:
    said = output_of([sys.executable, "-c", OUT_OF_MEMORY, str(little_memory), str(tmp_path)])
    assert "rank 1: EngineDied: its engine was killed by SIGKILL: the system ran out of mem" in said
    assert "kept: {0: '0'}" in said
    assert "rank 1: new engine with the" in said


def test_a_disk_that_is_full_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    alone = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=32m tmpfs {tmp_path}"
    tried = subprocess.run([*alone, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    said = output_of([
        *alone, "sh", "-c", f'{mount} && exec "$0" "$@"',
        sys.executable, "-c", FULL_DISK, str(tmp_path),
    ])  # fmt: skip
    assert said.startswith("finished\n")
    assert "No space left on device" in said
    assert "the newest whole one is step-00000003. Training goes on" in said
    assert "'step-00000003']" in said
    assert "from step 3" in said


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
