"""What a test of a training cell works with: digits, a session that has them, and plain Python."""

from __future__ import annotations

import ast
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dtkit
from dtkit.guard.processes import Identity
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dtkit.driver.runs.run import Run
    from dtkit.launch import Launch
    from dtkit.options import RunOptions

# Any: what a cell leaves in its namespace.

DIGITS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits

digits = load_digits()
X = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
train_set = TensorDataset(X, y)
"""
"""An earlier cell of the notebook: scikit-learn's digits, 1797 samples of 64 numbers."""


class Rig:
    """A session with the digits on every rank, and the plain Python to compare it with."""

    def __init__(self, session: dtkit.Session, digits: dict[str, Any]) -> None:
        self.session = session
        self._digits = digits

    def plain(self, cell: str) -> dict[str, Any]:
        """Run a cell in this process, as on one device; returns its names."""
        namespace = dict(self._digits)
        exec(compile(cell, "<cell>", "exec"), namespace)  # noqa: S102  what is tested
        return namespace

    def train(
        self,
        cell: str,
        batch: str = "global",
        *,
        options: RunOptions | None = None,
        **recipe: Any,
    ) -> Run:
        """Run a cell under `%%dist_train`; `recipe` has further fields of its recipe."""
        return self.session.train(cell, recipe=Recipe(batch=batch, **recipe), options=options)

    def values(self, expression: str) -> list[Any]:
        """Evaluate an expression on every rank; literals only."""
        results = self.session.execute(expression).results
        return [ast.literal_eval(results[rank]) for rank in self.session.ranks]

    def common(self, expression: str) -> Any:
        """Evaluate an expression that must have the same value on every rank."""
        first, *others = self.values(expression)
        assert all(other == first for other in others), (expression, first, others)
        return first

    def places(self) -> list[dict[str, Any]]:
        """Return where each rank is now."""
        return [*self.session._engines.control("where").values()]

    def assert_same_weights(self, *models: str) -> None:
        """Assert that a model's parameters are bit-equal on all ranks."""
        for model in models:
            self.common(f"[float(p.double().sum()) for p in {model}.parameters()]")


def hold(run: Run, steps: Iterator[None]) -> float:
    """Drive a run that is paused on for some time; returns how many seconds."""
    begun_s = time.monotonic()
    for _ in range(20):
        next(steps)
        run.requests.alarm.wait(0.02)
    return time.monotonic() - begun_s


def train_on_two_nodes(
    launch: Launch, num_ranks: int, cell: str, digits: dict[str, Any], runs_dir: Path
) -> Iterator[dtkit.Session]:
    """Yield a session on two agents in which a cell was trained as one device does it."""
    session = dtkit.Session.start(num_ranks, launch=launch, devices="cpu", runs_dir=runs_dir)
    with session:
        per_node = num_ranks // 2
        assert [slot.local_rank for slot in session.slots] == [*range(per_node)] * 2
        assert len({slot.host for slot in session.slots}) == 2
        session.execute(DIGITS)
        rig = Rig(session, digits)
        run = rig.train(cell)
        assert relative_error(run.history["loss"], rig.plain(cell)["losses"]) < 1e-5
        assert [rank.host for rank in run.view().ranks] == [slot.host for slot in session.slots]
        pids = {*session.pids(), *(status.pid for status in session.status())}
        yield session
    assert not [pid for pid in pids if Identity.of(pid)]


def take_back_while_it_waits(launch: Launch, waits: str, runs_dir: Path) -> None:
    """Start a session whose job waits, and press ■ when the line under the cell says so."""

    def show(stage: str) -> None:
        if re.search(waits, stage):
            raise KeyboardInterrupt  # ■

    with pytest.raises(KeyboardInterrupt):
        dtkit.Session.start(
            2, launch=launch, devices="cpu", runs_dir=runs_dir, on_stage=show
        ).close()


def relative_error(curve: Any, expected: Any) -> float:
    """Return the largest relative error of a curve; they must be equally long."""
    curve, expected = np.asarray(curve, dtype=float), np.asarray(expected, dtype=float)
    assert curve.shape == expected.shape
    return float(np.max(np.abs(curve - expected) / np.abs(expected)))
