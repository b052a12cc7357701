"""What a rank that is five times slower costs under each strategy, in samples/s and in loss."""

from __future__ import annotations

import ast
import time
from typing import TYPE_CHECKING

import dtkit
from benchmarks.result import Result, Settings, Spread, number, paired
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from dtkit.driver.session import Session

__all__ = ["STRATEGIES", "straggler"]

STRATEGIES = ("ddp", "local-sgd:8", "diloco:8", "async:8", "async:inf", "gossip")

_DATA = """
import time
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

digits = load_digits()
picks = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
X = torch.tensor(digits.data, dtype=torch.float32)[picks] / 16
y = torch.tensor(digits.target)[picks]
"""
_CELL = """
torch.manual_seed({seed})
loader = DataLoader(TensorDataset(X[:1500], y[:1500]), batch_size=16, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
while True:
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        time.sleep({slow_s} if rank == 3 else {step_s})  # the step's computing
        optimizer.step()
"""
_LOSS = "float(cross_entropy(model(X[1500:]), y[1500:]))"
_STEP_S = 0.02
_SLOWER = 5


def straggler(settings: Settings) -> list[Result]:
    """Train for the same time under each strategy in turn, rank 3 slow and not.

    A step computes by sleeping: four ranks then fit on any machine, and what is measured
    is who waits for whom. A run is stopped after that time and its model, which is then
    the same on all ranks, is evaluated on samples that nobody has trained on.
    """
    num_rounds, seconds = settings.pick(3, 1), settings.pick(8, 4)
    rates: dict[str, list[float]] = {s: [] for s in STRATEGIES}
    losses: dict[str, list[float]] = {s: [] for s in STRATEGIES}
    even_rates: dict[str, list[float]] = {s: [] for s in STRATEGIES}
    with dtkit.Session.start(4, runs_dir=settings.folder) as session:
        session.execute(_DATA)
        for seed in range(num_rounds):
            for strategy in STRATEGIES:
                rate, loss = _train(session, strategy, seed, seconds, _SLOWER)
                rates[strategy].append(rate)
                losses[strategy].append(loss)
                even_rates[strategy].append(_train(session, strategy, seed, seconds, 1)[0])
    details = {
        s: f"{number(Spread.of(rates[s]).median)} samples/s with the straggler, "
        f"{number(Spread.of(even_rates[s]).median)} without, held-out loss after {seconds} s "
        f"with it {number(Spread.of(losses[s]).median)}"
        for s in STRATEGIES
    }
    command = f"--strategy ddp; 4 ranks, a step of {1000 * _STEP_S:g} ms, on rank 3 of {_SLOWER} ×"
    held_back_by = "what a rank does beside computing: the exchange after each step"
    return [
        Result(
            name="straggler", what=f"samples/s with a 5 × straggler, {strategy} to ddp",
            spread=paired(rates[strategy], rates["ddp"]), unit="×", goal=3.0, better="more",
            num_steps=num_rounds, command=command, held_back_by=held_back_by,
            details=details if strategy == "async:inf" else {},
        )
        for strategy in ("async:inf", "async:8")
    ]  # fmt: skip


def _train(
    session: Session, strategy: str, seed: int, seconds: float, slower: float
) -> tuple[float, float]:
    """Return samples/s, and the loss on held-out samples after that time."""
    cell = _CELL.format(seed=seed, step_s=_STEP_S, slow_s=slower * _STEP_S)
    run, steps = session.training(cell, recipe=Recipe(strategy=strategy))
    begun_s = None
    for _ in steps:
        if begun_s is None and run.view().step:
            begun_s = time.monotonic()
        if begun_s and time.monotonic() - begun_s > seconds and not run.requests.is_stop:
            run.stop()
        run.requests.alarm.wait(0.02)
    loss = ast.literal_eval(session.execute(_LOSS).results[0])
    history = run.history
    return float(history["samples_per_s"].dot(history["step_ms"]) / history["step_ms"].sum()), loss
