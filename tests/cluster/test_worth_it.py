"""What a run says at its end: what compression or accumulation would gain, or nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig import Rig

    from dtkit.driver.runs.run import Run

pytestmark = pytest.mark.alone

CELL = """
import time
torch.manual_seed(0)
model = nn.Linear(256, 256)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for i in range(30):
    optimizer.zero_grad()
    time.sleep(COMPUTE)  # the workload: a step that computes so long
    model(torch.ones(4, 256)).mean().backward()
    optimizer.step()
"""
SLOW_LINK = """
import time
fast = dist.all_reduce

class Slow:
    def __init__(self, work, until_s):
        self.work, self.until_s = work, until_s
    def wait(self, *args):
        result = self.work.wait(*args)
        time.sleep(max(0.0, self.until_s - time.perf_counter()))  # the workload: a slow link
        return result

def slow(tensor, *args, **kwargs):
    seconds = tensor.numel() * tensor.element_size() / 20e6
    work = fast(tensor, *args, **kwargs)
    if work is None:
        return time.sleep(seconds)
    return Slow(work, time.perf_counter() + seconds)

dist.all_reduce = slow
"""


def cell(compute: str) -> str:
    return CELL.replace("COMPUTE", compute)


def said(run: Run) -> list[str]:
    return [note for note in run.notes if "waiting for the link" in note]


@pytest.fixture
def slow_link(rig2: Rig) -> Iterator[None]:
    """A link of 20 MB/s: a step sends 263 kB, which takes 13 ms."""
    rig2.session.execute(SLOW_LINK)
    yield
    rig2.session.execute("dist.all_reduce = fast")


@pytest.mark.usefixtures("slow_link")
def test_a_slow_link_is_said_with_what_would_help(rig2: Rig) -> None:
    run = rig2.session.train(cell("0.002"))
    (note,) = said(run)
    assert "263 kB" in note
    speed = re.search(r"at ([\d.]+) MB/s", note)
    assert speed is not None
    assert 10 < float(speed[1]) <= 20
    gains = dict(re.findall(r"(--compress \w+|--accumulate 4)[^,]* about ([\d.]+) ×", note))
    assert set(gains) == {"--compress fp16", "--compress int8", "--accumulate 4"}
    assert 1.1 <= float(gains["--compress fp16"]) < float(gains["--compress int8"])
    # What was proposed is as good as it was said, about.
    helped = rig2.session.train(cell("0.002"), recipe=Recipe(compress="fp16"))
    assert helped.view().comm_share < run.view().comm_share
    assert not [note for note in said(helped) if "--compress" in note]


def test_a_run_that_computes_says_nothing(rig2: Rig) -> None:
    assert not said(rig2.session.train(cell("0.05")))


@pytest.mark.usefixtures("slow_link")
def test_a_run_whose_one_rank_is_slow_says_nothing(rig2: Rig) -> None:
    assert not said(rig2.session.train(cell("0.2 if rank else 0.1")))
