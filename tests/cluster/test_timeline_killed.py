"""The trace of a run is valid JSON at every instant, also when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_trace_files import assert_valid

from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dtkit

CELL = """
import torch
from torch import nn
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(1_000_000):
    optimizer.zero_grad()
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
"""


def read(path: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(path.read_text())
    assert_valid(trace)
    return trace


def num_spans(trace: dict[str, Any]) -> int:
    return sum(event.get("name") == "backward" for event in trace["traceEvents"])


def drive(steps: Iterator[None], path: Path) -> None:
    """Drive the run to its end, reading the trace all the while."""
    for _ in steps:
        assert num_spans(read(path)) > 0


def test_a_trace_is_whole_while_it_is_written_and_after_a_kill(session2: dtkit.Session) -> None:
    run, steps = session2.training(CELL, options=RunOptions(timeline="", timeline_steps=50))
    path = run.dir / "timeline.json"
    assert num_spans(read(path)) == 0  # valid before the first step
    sizes = set()
    for _ in steps:
        sizes.add(num_spans(read(path)))
        if len(sizes) > 2:
            break
        threading.Event().wait(0.002)
    assert 0 < max(sizes) <= 2 * 50
    os.kill(session2.status()[1].pid, signal.SIGKILL)
    with pytest.raises(RankError):
        drive(steps, path)
    assert run.state == "failed"
    assert num_spans(read(path)) > 0
