"""`hvd.DistributedOptimizer`: dtkit’s against Horovod’s own, one script under both launchers."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cells import MODELS, NUM_RANKS
from benchmarks.processes import BenchmarkError, Launched
from benchmarks.step_time import NUM_WARM_BLOCKS, Files, check_alike, compared
from benchmarks.turns import alternate

if TYPE_CHECKING:
    from benchmarks.cells import Kind
    from benchmarks.result import Result, Settings

__all__ = ["against_horovod"]

_GOAL = 1 / 1.3
_OURS = (
    sys.executable, "-c", "from dtkit.horovod.launch import main; raise SystemExit(main())",
    "-np", str(NUM_RANKS), "--hvd", "dtkit", sys.executable,
)  # fmt: skip


def against_horovod(settings: Settings) -> list[Result]:
    """Measure the step of a Horovod script on dtkit's interface against Horovod itself.

    `HOROVOD_PYTHON` names a Python that has Horovod (0.28.1) and the same torch.
    """
    python = os.environ.get("HOROVOD_PYTHON")
    launcher = python and shutil.which("horovodrun", path=str(Path(python).parent))
    if not python or not launcher:
        msg = "HOROVOD_PYTHON must name a Python beside whose executable is Horovod's horovodrun"
        raise BenchmarkError(msg)
    # -u: horovodrun copies what the ranks print.
    theirs = (
        launcher, "--gloo", "-np", str(NUM_RANKS), "-H", f"localhost:{NUM_RANKS}",
        "--network-interfaces", "lo", python, "-u",
    )  # fmt: skip
    return [
        _measure(settings, size, theirs, kind)
        for size in MODELS
        for kind in ("horovod", "barrier")
    ]  # fmt: skip


def _measure(settings: Settings, size: str, command: tuple[str, ...], kind: Kind) -> Result:
    """Compare Horovod's step with ours, or with one that only waits: what there is to win."""
    is_ours = kind == "horovod"
    num_blocks = (settings.pick(30, 6) if is_ours else settings.pick(12, 6)) + NUM_WARM_BLOCKS
    folder = settings.folder / f"{size} {kind}"
    here, there = (Files(folder / name, num_blocks, MODELS[size]) for name in ("ours", "theirs"))
    with (
        Launched(_OURS, here.script(kind), here.folder) as ours,
        Launched(command, there.script("horovod"), there.folder) as theirs,
    ):
        alternate([(ours, here.baton), (theirs, there.baton)], num_blocks)
        ours.wait()
        theirs.wait()
    mine, other = here.read(), there.read()
    what = "of DistributedOptimizer" if is_ours else "that waits for the other rank, and no more,"
    reason = "negotiation in Python where Horovod's is in C++" if is_ours else "computing"
    result = compared(
        "horovod", f"step {what} / Horovod's, {size} parameters", mine, other,
        goal=_GOAL if is_ours else None, command="horovodrun --gloo -np 2 --network-interfaces lo",
        held_back_by=reason,
    )  # fmt: skip
    if is_ours:
        check_alike(mine, other)
        result.details["last loss, ours and Horovod's"] = f"{mine.loss:.9g}, {other.loss:.9g}"
    return result
