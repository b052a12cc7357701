"""Flags that change how a cell trains work together: every pair of their values in some run."""

from __future__ import annotations

import random
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

FACTORS: dict[str, tuple[Any, ...]] = {
    "compress": ("none", "fp16", "bf16", "int8", "int4", "sign", "topk:0.1", "powersgd:2"),
    "amp": ("off", "bf16", "fp16"),
    "accumulate": (1, 2),
    "batch": ("rank", "global"),
    "batch_size": (None, 24),
    "statistics": ("nn.BatchNorm1d(32)", "nn.Identity()"),
    "optimizer": ("SGD(model.parameters(), lr=0.05, momentum=0.9)", "AdamW(model.parameters())"),
    "clip": ("pass", "nn.utils.clip_grad_norm_(model.parameters(), 1.0)"),
    "checkpoint_every": (0, 2),
}
CELL = """
torch.manual_seed(0)
loader = DataLoader(few, batch_size=48, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), STATISTICS, nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.OPTIMIZER
for epoch in range(2):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        CLIP
        optimizer.step()
state = [float(t.double().sum()) for t in model.state_dict().values()]
"""


def rows() -> list[dict[str, Any]]:
    """Return few combinations in which each two values of two factors meet at least once."""
    chance = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in combinations(FACTORS.items(), 2)
        for x in xs
        for y in ys
    }
    found = []
    while missing:
        first = min(missing, key=repr)
        tries = [
            {name: chance.choice(values) for name, values in FACTORS.items()} | dict(first)
            for _ in range(100)
        ]
        best = max(tries, key=lambda row: len(missing.intersection(_pairs(row))))
        missing.difference_update(_pairs(best))
        found.append(best)
    return found


def _pairs(row: dict[str, Any]) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    return list(combinations(row.items(), 2))


def test_every_pair_trains_and_the_ranks_end_alike(rig2: Rig) -> None:
    rig2.session.execute("few = TensorDataset(X[:192], y[:192])")
    for row in rows():
        cell = CELL
        for name in ("statistics", "optimizer", "clip"):
            cell = cell.replace(name.upper(), row[name])
        flags = {k: row[k] for k in ("compress", "amp", "accumulate", "batch", "batch_size")}
        options = RunOptions(checkpoint_every=row["checkpoint_every"])
        run = rig2.session.train(cell, recipe=Recipe(**flags), options=options)
        assert run.state == "finished", row
        assert not any("different weights" in note for note in run.notes), row
        per_rank = 24 if row["batch_size"] else 48
        per_step = per_rank * (2 if row["batch"] == "rank" else 1)
        num_steps = 2 * -(-192 // per_step // row["accumulate"])
        num_skipped = run.history["skipped_steps"][-1] if "skipped_steps" in run.history else 0
        assert len(run.history["loss"]) + num_skipped == num_steps, row
        assert np.isfinite(run.history["loss"]).all(), row
        assert np.isfinite(rig2.common("state")).all(), row


START = "model = nn.Linear(64, 10); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)"
CLOSURE = """
optimizer = torch.optim.LBFGS(model.parameters())
optimizer.step(lambda: cross_entropy(model(X[:64]), y[:64]))
"""
HOROVOD = """
import horovod.torch as hvd
hvd.init()
optimizer = hvd.DistributedOptimizer(optimizer)
cross_entropy(model(X[:64]), y[:64]).backward()
optimizer.step()
"""
SHARDED = """
from torch.distributed.fsdp import fully_shard
fully_shard(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
NONSENSE = {
    "a closure has no step to hold back": (
        {"accumulate": 2},
        CLOSURE,
        "so there is no step to hold back or to skip",
    ),
    "nor one to skip": (
        {"amp": "fp16"},
        CLOSURE,
        "so there is no step to hold back or to skip",
    ),
    "DDP averages at once": (
        {"accumulate": 2},
        "model = nn.parallel.DistributedDataParallel(model)",
        "which averages in every backward pass",
    ),
    "Horovod's optimizer sends by itself": (
        {"compress": "int8"},
        HOROVOD,
        "hvd.DistributedOptimizer combines its gradients.*leave the flag out",
    ),
    "and counts passes by itself": (
        {"accumulate": 2},
        HOROVOD,
        "backward_passes_per_step=K in the cell, and leave the flag out",
    ),
    "so does FSDP": (
        {"compress": "topk:0.1"},
        SHARDED,
        "FSDP or tensor parallel.*leave the flag out",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_what_makes_no_sense_is_refused_with_the_reason(rig2: Rig, case: str) -> None:
    flags, lines, message = NONSENSE[case]
    with pytest.raises(RankError, match=message) as caught:
        rig2.session.train(f"{START}\n{lines}", recipe=Recipe(**flags))
    assert {cause.ename for cause in caught.value.causes} == {"RuntimeError"}
