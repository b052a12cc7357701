"""Sessions on real engines, and a cell run in plain Python beside the same cell on all ranks."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dtkit
from dtkit.guard.processes import Identity
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.run import Run

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

    def train(self, cell: str, batch: str = "global", *, manual: bool = False) -> Run:
        """Run a cell under `%%dist_train`."""
        return self.session.train(cell, recipe=Recipe(batch=batch, manual=manual))

    def values(self, expression: str) -> list[Any]:
        """Evaluate an expression on every rank; literals only."""
        results = self.session.execute(expression).results
        return [ast.literal_eval(results[rank]) for rank in self.session.ranks]

    def common(self, expression: str) -> Any:
        """Evaluate an expression that must have the same value on every rank."""
        first, *others = self.values(expression)
        assert all(other == first for other in others), (expression, first, others)
        return first

    def assert_same_weights(self, *models: str) -> None:
        """Assert that a model's parameters are bit-equal on all ranks."""
        for model in models:
            self.common(f"[float(p.double().sum()) for p in {model}.parameters()]")


def relative_error(curve: Any, expected: Any) -> float:
    """Return the largest relative error of a curve; they must be equally long."""
    curve, expected = np.asarray(curve, dtype=float), np.asarray(expected, dtype=float)
    assert curve.shape == expected.shape
    return float(np.max(np.abs(curve - expected) / np.abs(expected)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names of the earlier cell, in this process."""
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        # torch sets it when its compiler is loaded, at an optimizer's first step.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        exec(DIGITS, namespace)  # noqa: S102  our own text
        yield namespace


@pytest.fixture(scope="module")
def start_session(
    tmp_path_factory: pytest.TempPathFactory,
    owned_pids: set[int],
    one_thread: None,  # noqa: ARG001  before the engines start
) -> Iterator[Callable[[int], dtkit.Session]]:
    """Start the module's session; when it is closed no process of it is left."""
    sessions: list[tuple[dtkit.Session, set[int]]] = []

    def start(num_ranks: int) -> dtkit.Session:
        session = dtkit.Session.start(num_ranks, runs_dir=tmp_path_factory.mktemp("runs"))
        pids = set(session.pids())
        owned_pids.update(pids)
        sessions.append((session, pids))
        return session

    yield start
    for session, pids in sessions:
        session.close()
        owned_pids.difference_update(pids)
        assert not [pid for pid in pids if Identity.of(pid)]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let processes that are started compute on one thread: ranks outnumber the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def session2(start_session: Callable[[int], dtkit.Session]) -> dtkit.Session:
    """Two ranks. A process has one session at a time: use `session4` in another module."""
    return start_session(2)


@pytest.fixture(scope="module")
def session4(start_session: Callable[[int], dtkit.Session]) -> dtkit.Session:
    """Four ranks."""
    return start_session(4)


@pytest.fixture(scope="module")
def rig2(session2: dtkit.Session, digits: dict[str, Any]) -> Rig:
    """Two ranks with the digits."""
    session2.execute(DIGITS)
    return Rig(session2, digits)


@pytest.fixture(scope="module")
def rig4(session4: dtkit.Session, digits: dict[str, Any]) -> Rig:
    """Four ranks with the digits."""
    session4.execute(DIGITS)
    return Rig(session4, digits)
