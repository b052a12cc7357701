"""How long until the ranks work: the first collective, and the first step after an edit."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.cells import NUM_RANKS, collective, first_step
from benchmarks.processes import Notebook, torchrun
from benchmarks.result import Result, Settings, paired, typical

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["first_collective", "rerun"]

_START = "%load_ext dtkit\n%dist_init -n 2 --devices cpu"

_IPYPARALLEL = """\
import ipyparallel as ipp
cluster = ipp.Cluster(n=2, log_level=40)
client = cluster.start_and_connect_sync()
"""
"""As its documentation starts a cluster; the ranks are then told apart as a user would."""

_IPYPARALLEL_RUN = """\
view = client[:]
view.scatter("rank", range(2), flatten=True, block=True)
view.execute({code!r}, block=True)
"""

_IPYPARALLEL_JOIN = """\
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
"""


def first_collective(settings: Settings) -> list[Result]:
    """Measure start to first collective: dtkit, torchrun, ipyparallel by itself."""
    ways: dict[str, Callable[[Path], float]] = {
        "dtkit": _start_dtkit, "torchrun": _start_torchrun, "ipyparallel": _start_ipyparallel,
    }  # fmt: skip
    seconds = _in_turns(ways, settings.pick(7, 2), settings.folder / "start")
    details = {name: typical(values, "s") for name, values in seconds.items()}
    make = partial(
        Result, unit="×", num_steps=len(seconds["dtkit"]), details=details
    )  # each "step" is a start
    return [
        make(
            name="start",
            what="%dist_init to the first collective / torchrun to the first collective",
            spread=paired(seconds["dtkit"], seconds["torchrun"]), goal=1.1,
            command="python -m torch.distributed.run, a script with one all_reduce",
            held_back_by="the import of torch and the start of ipyparallel's processes beside it",
        ),
        make(
            name="start_ipp",
            what="%dist_init to the first collective / bare ipyparallel to the first collective",
            spread=paired(seconds["dtkit"], seconds["ipyparallel"]), goal=0.6,
            command="ipyparallel.Cluster(n=2).start_and_connect_sync(), then execute",
            held_back_by="the import of torch, which both pay in full",
        ),
    ]  # fmt: skip


def rerun(settings: Settings) -> list[Result]:
    """Measure edit and rerun to the first step: the cell again, against torchrun again."""
    num_rounds = settings.pick(6, 2)
    folder = settings.folder / "rerun"
    (folder / "notebook").mkdir(parents=True)
    with Notebook(folder / "notebook") as notebook:
        notebook.run(_START)
        ways: dict[str, Callable[[Path], float]] = {
            "torchrun": partial(_step_torchrun, lr=0.01),
            "dtkit": lambda out: _step_dtkit(notebook, out),
        }
        seconds = _in_turns(ways, num_rounds, folder)
    return [
        Result(
            name="rerun",
            what="edit and rerun to the first step: torchrun / %%dist_train on the same engines",
            spread=paired(seconds["torchrun"], seconds["dtkit"]),
            unit="×",
            goal=50,
            better="more",
            num_steps=num_rounds,
            command="python -m torch.distributed.run, the same text",
            held_back_by="what a run sets up and the dashboard draws before the cell is sent",
            details={
                "torchrun": typical(seconds["torchrun"], "s"),
                "dtkit": typical(seconds["dtkit"], "ms", 1e3),
            },
        )
    ]


def _in_turns(
    ways: dict[str, Callable[[Path], float]], num_rounds: int, folder: Path
) -> dict[str, list[float]]:
    """Take every way once in each round, every second round in the opposite order.

    One more round goes first and is not counted: files come from the disk then.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(num_rounds + 1):
        names = list(ways) if i % 2 else list(ways)[::-1]
        for name in names:
            place = folder / f"{name}-{i}"
            place.mkdir(parents=True)
            took_s = ways[name](place)
            if i:
                seconds[name].append(took_s)
    return seconds


def _start_dtkit(folder: Path) -> float:
    with Notebook(folder) as notebook:
        begun_s = time.monotonic()
        notebook.run(_START)
        notebook.run("%%dist\n" + collective(out=folder / "at"))
        return _last(folder) - begun_s


def _start_ipyparallel(folder: Path) -> float:
    join = _IPYPARALLEL_JOIN.format(store=folder / "store")
    code = collective(out=folder / "at", init=join)
    with Notebook(folder, IPYTHONDIR=str(folder / "ipython")) as notebook:
        begun_s = time.monotonic()
        notebook.run(_IPYPARALLEL + _IPYPARALLEL_RUN.format(code=code))
        took_s = _last(folder) - begun_s
        notebook.run("cluster.stop_cluster_sync()")
        return took_s


def _start_torchrun(folder: Path) -> float:
    with torchrun(collective(out=folder / "at"), folder) as script:
        script.wait()
        return _last(folder) - script.begun_s


def _step_torchrun(folder: Path, lr: float) -> float:
    with torchrun(first_step(out=folder / "at", lr=lr), folder) as script:
        script.wait()
        return _last(folder) - script.begun_s


def _step_dtkit(notebook: Notebook, folder: Path) -> float:
    """Rerun the cell with another learning rate."""
    cell = "%%dist_train\n" + first_step(out=folder / "at", lr=0.01 + 0.001 * len(folder.name))
    begun_s = time.monotonic()
    notebook.run(cell)
    return _last(folder) - begun_s


def _last(folder: Path) -> float:
    """Return when the last rank was there, on the clock that all processes share."""
    return max(float((folder / f"at{rank}").read_text()) for rank in range(NUM_RANKS))
