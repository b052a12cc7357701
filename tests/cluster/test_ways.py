"""What a plain run can do, runs that train in other ways can too: pause, stop, timeline, sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from models import SETUP, cell_for
from rig import hold

from dtkit.errors import RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe
from dtkit.trace.analysis import analyse
from dtkit.trace.rows import read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rig import Rig

    from dtkit.driver.runs.run import Run

# Any: fields of a recipe.

WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shard": ("dtkit.shard(model)", "loss_of(model(xb), yb)", {}),
    "data x tensor": ("dtkit.tensor_parallel(model, num_ranks=2)", "loss_of(model(xb), yb)", {}),
    "pipeline": ("parts = dtkit.pipeline(layers_of(model), loss_of)", "parts(xb, yb)", {}),
    "data x pipeline": (
        "parts = dtkit.pipeline(layers_of(model), loss_of, num_ranks=2)", "parts(xb, yb)", {},
    ),
    "hybrid": ("pass", "loss_of(model(xb), yb)", {"strategy": "hybrid:2"}),
    "local-sgd": ("pass", "loss_of(model(xb), yb)", {"strategy": "local-sgd:4"}),
    "async": ("pass", "loss_of(model(xb), yb)", {"strategy": "async:4"}),
    "gossip": ("pass", "loss_of(model(xb), yb)", {"strategy": "gossip"}),
}  # fmt: skip
FREE = ("async", "gossip")


@pytest.fixture(scope="module")
def rig(rig4: Rig) -> Rig:
    rig4.session.execute(SETUP)
    return rig4


def cell_of(way: str, kind: str = "mlp") -> str:
    layout, loss, _ = WAYS[way]
    return cell_for(kind, layout, loss)


def start(rig: Rig, way: str, **options: Any) -> tuple[Run, Iterator[None]]:
    """Start a run that never ends by itself."""
    cell = cell_of(way).replace("range(2)", "range(10**6)")
    return rig.session.training(cell, recipe=Recipe(**WAYS[way][2]), options=RunOptions(**options))


def go_on(run: Run, steps: Iterator[None], until: Callable[[], bool]) -> None:
    for _ in steps:
        if until():
            return
        run.requests.alarm.wait(0.01)


@pytest.mark.parametrize("way", WAYS)
def test_it_pauses_goes_on_and_stops_at_a_step(rig: Rig, way: str) -> None:
    run, steps = start(rig, way, timeline="")
    go_on(run, steps, lambda: run.view().step > 5)
    run.pause()
    go_on(run, steps, lambda: run.view().state == "paused")
    paused_s = hold(run, steps)
    reached = run.view().step
    run.pause(is_paused=False)
    go_on(run, steps, lambda: run.view().step > reached + 5)
    run.stop()
    go_on(run, steps, lambda: False)
    assert (run.state, run.error) == ("stopped", None)
    assert np.diff(run.history["time_s"]).max() >= paused_s / 2  # nobody made a step meanwhile
    made = rig.values("len(losses)")
    assert way in FREE or len(set(made)) == 1
    found = analyse(read_run(run.dir))
    assert found is not None
    assert [rank.rank for rank in found.ranks] == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["data x tensor", "data x pipeline", "gossip"])
def test_stop_now_frees_it_from_a_collective(rig: Rig, way: str) -> None:
    cell = cell_of(way) + "    if epoch:\n        dist.recv(torch.ones(1), src=(rank + 1) % 4)\n"
    run, steps = rig.session.training(cell, recipe=Recipe(**WAYS[way][2]))
    go_on(run, steps, lambda: all(p.operation == "recv" for p in rig.session.where()))
    run.requests.stop_now()
    go_on(run, steps, lambda: False)
    assert run.state == "stopped"
    assert len(set(rig.values("world_size"))) == 1


@pytest.mark.parametrize("way", ["shard", "data x tensor", "pipeline", "async"])
def test_a_sweep_starts_each_from_the_same(rig: Rig, way: str) -> None:
    sweep = rig.session.sweep(
        cell_of(way),
        {"batch_size": [9, 18]},
        recipe=Recipe(**WAYS[way][2]),
        options=RunOptions(max_steps=6),
    )
    assert [row.state for row in sweep.rows] == ["stopped", "stopped"], sweep


@pytest.mark.parametrize("way", ["hybrid", "pipeline"])
def test_when_a_rank_is_lost_a_new_engine_trains_anew(
    rig: Rig, way: str, owned_pids: set[int]
) -> None:
    cell = cell_of(way).replace(
        "optimizer.step()", "rank == 2 and len(losses) == 5 and os.kill(os.getpid(), 9)"
    )
    options = RunOptions(auto_restart=True)
    with pytest.raises(RankError, match="rank 2: EngineDied: its engine was killed by SIGKILL"):
        rig.session.train("import os\n" + cell, recipe=Recipe(**WAYS[way][2]), options=options)
    owned_pids.update(rig.session.pids())
    rig.session.execute(SETUP)
    run = rig.session.train(cell_of(way), recipe=Recipe(**WAYS[way][2]))
    assert run.state == "finished"
