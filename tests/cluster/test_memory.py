"""A cell that runs out of memory says so, lets go of what it held, and says what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dtkit.errors import RankError

if TYPE_CHECKING:
    from rig import Rig

HELD = """
import weakref
import torch

def forward():
    global held
    activations = torch.ones(1000, 1000)
    held = weakref.ref(activations)
    return activations.sum() + torch.ones(2**60)

if rank == 1:
    forward()
dist.all_reduce(torch.ones(1))
"""

LIMITED = """
import resource

def grow():
    return [torch.ones(2**22) for _ in range(10_000)]

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**28
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
try:
    grow()
finally:
    resource.setrlimit(resource.RLIMIT_AS, before)
"""

TRAINING = """
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
num_batches = 0
for images, labels in DataLoader(train_set, batch_size=64, shuffle=True):
    num_batches += 1
    if rank == 0 and num_batches == 3:
        images = torch.ones(2**60)
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()
"""


def test_what_the_frames_held_is_let_go_and_memory_is_told_by_rank(rig2: Rig) -> None:
    with pytest.raises(RankError) as caught:
        rig2.session.execute(HELD)
    (cause,) = caught.value.causes
    assert cause.rank == 1
    assert cause.evalue.startswith("out of memory on the CPU, ")
    assert " in use, " in cause.evalue
    assert "Next: a smaller tensor" in cause.evalue
    text = str(caught.value)
    assert "group rebuilt; state kept" in text
    assert "memory now: rank 0 0." in text
    assert ", rank 1 0." in text
    (freed,) = rig2.session.execute("held() is None", ranks=[1]).results.values()
    assert freed == "True"


def test_a_host_that_gives_no_more_is_named_too(rig2: Rig) -> None:
    with pytest.raises(RankError, match=r"out of memory on the CPU, 16\.0 MiB wanted") as caught:
        rig2.session.execute(LIMITED)
    assert len(caught.value.causes) == 2
    assert rig2.common("bool(torch.ones(2**24).sum() > 0)")


def test_in_a_run_the_next_smaller_batch_is_named(rig2: Rig) -> None:
    with pytest.raises(RankError, match="Next: batches of 32 in place of 64 on this rank") as e:
        rig2.session.train(TRAINING)
    assert "EiB" not in str(e.value)
    assert "4.0 PiB" not in str(e.value)
    assert "4096.0 PiB wanted" in str(e.value)
    assert rig2.common("num_batches") == 3


def test_another_error_is_left_as_it_is(rig2: Rig) -> None:
    with pytest.raises(RankError) as caught:
        rig2.session.execute("raise RuntimeError('shapes do not match')")
    assert caught.value.causes[0].evalue == "shapes do not match"
    assert "memory" not in str(caught.value)
