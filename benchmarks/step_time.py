"""What a step costs: a DDP cell against torchrun, and the plain cell against the DDP cell."""

from __future__ import annotations

from statistics import mean, median
from typing import TYPE_CHECKING

from benchmarks.cells import MODELS, USUAL, training
from benchmarks.processes import BenchmarkError, Notebook, torchrun
from benchmarks.result import Result, Settings, paired, typical
from benchmarks.turns import Baton, Timed, alternate

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.cells import Kind, Model

__all__ = [
    "NUM_WARM_BLOCKS",
    "Files",
    "against_ddp",
    "against_torchrun",
    "check_alike",
    "compared",
    "with_profiler",
    "with_timeline",
]

NUM_WARM_BLOCKS = 2
_NUM_FIRST_STEPS = 10
"""Of each run, not counted: they lay out the buckets, or come before the profiler's."""
_RELATIVE = 1e-4
START = "%load_ext dtkit\n%dist_init -n 2 --devices cpu"


def against_torchrun(settings: Settings) -> list[Result]:
    """Measure the step of a DDP cell under the dashboard against the same loop under torchrun."""
    num_blocks = settings.pick(30, 6) + NUM_WARM_BLOCKS
    here, there = (
        Files(settings.folder / "cell", num_blocks),
        Files(settings.folder / "torchrun", num_blocks),
    )
    with (
        Notebook(here.folder) as notebook,
        torchrun(there.script("ddp"), there.folder) as script,
    ):
        notebook.run(START)
        notebook.begin("%%dist_train\n" + here.script("ddp"))
        alternate([(notebook, here.baton), (script, there.baton)], num_blocks)
        notebook.wait()
        script.wait()
    ours, theirs = here.read(), there.read()
    if ours.loss != theirs.loss:
        msg = f"both sides must train alike: last loss {ours.loss} and {theirs.loss}"
        raise BenchmarkError(msg)
    return [
        compared(
            "step", "step of a DDP cell with the dashboard on / of the same loop under torchrun",
            ours, theirs, goal=1.01, command="python -m torch.distributed.run (same text)",
            held_back_by=(
                "on a machine with no core to spare the driver draws on the ranks' own cores; "
                "compare dashboard_cpu, and the recording cost in µs with the step"
            ),
        )
    ]  # fmt: skip


def against_ddp(settings: Settings) -> list[Result]:
    """Measure the step of a plain cell against that of a DDP cell, both without dashboard."""
    results = []
    for size, model in MODELS.items():
        plain, ddp = _runs_in_turns(
            settings, ("%%dist_train", "plain"), ("%%dist_train", "ddp"),
            settings.pick(30, 6), model,
        )  # fmt: skip
        results.append(
            compared(
                "plain",
                "step of a plain cell made data parallel / of the same cell written with DDP, "
                f"{size} parameters",
                plain, ddp, goal=1.03, command="%%dist_train with DDP, dashboard off",
                held_back_by="hooks in Python for every parameter, where DDP's are in C++",
            )
        )  # fmt: skip
    return results


def with_timeline(settings: Settings) -> list[Result]:
    """Measure the step of a plain cell with its timeline recorded against one without."""
    traced, bare = _runs_in_turns(
        settings,
        ("%%dist_train --timeline", "plain"),
        ("%%dist_train", "plain"),
        settings.pick(40, 6),
    )
    return [
        compared(
            "timeline", "step of a plain cell with --timeline / of the same cell without",
            traced, bare, goal=1.02, command="%%dist_train, dashboard off",
            held_back_by="calls in Python for each phase and each collective",
        )
    ]  # fmt: skip


def with_profiler(settings: Settings) -> list[Result]:
    """Measure a step that torch's profiler records against one without."""
    profiled, bare = _runs_in_turns(
        settings,
        (f"%%dist_train --profile {USUAL.num_steps}", "plain"),
        ("%%dist_train", "plain"),
        settings.pick(10, 4),
    )
    return [
        compared(
            "profiler", "step of a plain cell that --profile records / of the same cell without",
            profiled, bare, goal=None, command="%%dist_train, dashboard off",
            held_back_by="torch's profiler itself; only the steps that it is asked for",
        )
    ]  # fmt: skip


def _runs_in_turns(
    settings: Settings,
    ours: tuple[str, Kind],
    theirs: tuple[str, Kind],
    num_rounds: int,
    model: Model = USUAL,
) -> tuple[Timed, Timed]:
    """Train two cells, each given by its magic's line and its kind, in turns in one session.

    Not in two: they differ by up to 15 % as long as they live, whatever they compute.
    """
    out = settings.folder / "times.json"
    timed: tuple[list[Timed], list[Timed]] = ([], [])
    with Notebook(settings.folder, DTKIT_UI="off") as notebook:
        notebook.run(START)
        for i in range(num_rounds + 1):
            for side in (0, 1) if i % 2 else (1, 0):
                magic, kind = (ours, theirs)[side]
                num_steps = _NUM_FIRST_STEPS + model.num_steps
                cell = training(kind, num_blocks=1, block_steps=num_steps, out=out, model=model)
                notebook.run(f"{magic}\n{cell}")
                if i:  # the first run of each loads what it needs
                    timed[side].append(
                        Timed.read(out, num_warm_blocks=0, num_warm_steps=_NUM_FIRST_STEPS)
                    )
    mine, other = (Timed.joined(blocks) for blocks in timed)
    if ours[1] == theirs[1]:  # DDP's sampler draws other batches
        check_alike(mine, other)
    return mine, other


def check_alike(ours: Timed, theirs: Timed) -> None:
    """Raise BenchmarkError if the last losses differ by more than a sum in another order does."""
    if abs(ours.loss - theirs.loss) > _RELATIVE * abs(theirs.loss):
        msg = f"both sides must train alike: last loss {ours.loss} and {theirs.loss}"
        raise BenchmarkError(msg)


class Files:
    """The files of one side.

    Args:
        folder: made for them.
        num_blocks: that it computes.
        model: that it trains.
    """

    def __init__(self, folder: Path, num_blocks: int, model: Model = USUAL) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.baton = Baton(folder / "turns")
        self._out = folder / "times.json"
        self._num_blocks = num_blocks
        self._model = model

    def script(self, kind: Kind) -> str:
        """Return the loop, in turns with another side."""
        return training(
            kind,
            num_blocks=self._num_blocks,
            block_steps=self._model.num_steps,
            out=self._out,
            turns=self.baton.paths,
            model=self._model,
        )

    def read(self) -> Timed:
        """Return what it measured, once it has ended."""
        self.baton.close()
        return Timed.read(self._out, num_warm_blocks=NUM_WARM_BLOCKS)


def compared(
    name: str,
    what: str,
    ours: Timed,
    theirs: Timed,
    *,
    goal: float | None,
    command: str,
    held_back_by: str,
) -> Result:
    """Return the ratio of the blocks' medians; beside it, of their means."""
    medians = paired([median(b) for b in ours.blocks_s], [median(b) for b in theirs.blocks_s])
    means = paired([mean(b) for b in ours.blocks_s], [mean(b) for b in theirs.blocks_s])
    return Result(
        name=name,
        what=f"{what}; median step of each block of {len(ours.blocks_s[0])}",
        spread=medians,
        unit="×",
        goal=goal,
        num_steps=ours.num_steps,
        command=command,
        held_back_by=held_back_by,
        details={
            "by the mean step of each block": f"{means} ×",
            "by CPU time of rank 0": f"{paired(ours.cpu_s, theirs.cpu_s)} ×",
            "ours": typical([s for b in ours.blocks_s for s in b], "ms", 1e3),
            "theirs": typical([s for b in theirs.blocks_s for s in b], "ms", 1e3),
        },
    )
