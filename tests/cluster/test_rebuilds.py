"""The group is rebuilt many times under a live model: no deadlock, and nothing is left over."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest
from test_faults import CASES, SETUP, check

from dtkit.errors import RankError

if TYPE_CHECKING:
    import dtkit

NUM_REBUILDS = 60
NUM_LONG = 300
WARM = 10
COUNT = "gc.collect() * 0 + len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task'))"


def held(session: dtkit.Session) -> list[tuple[int, int]]:
    """Return descriptors and threads of each engine."""
    return [ast.literal_eval(text) for _, text in sorted(session.execute(COUNT).results.items())]


@pytest.mark.timeout(600)
def test_rebuilds_leave_nothing_behind(session2: dtkit.Session, *, is_long: bool) -> None:
    session2.execute("import gc, os\n" + SETUP)
    before = []
    for i in range(NUM_LONG if is_long else NUM_REBUILDS):
        session2.reset_group()
        if i % WARM == 0:
            assert len(set(session2.execute("train()").results.values())) == 1
        if i == WARM:
            before = held(session2)
    # Fewer is no fault: the session may come from another test, whose last sockets close meanwhile.
    for now, then in zip(held(session2), before, strict=True):
        assert now[0] <= then[0]
        assert now[1] <= then[1]


def test_functions_of_torch_follow_the_rebuilt_group(session2: dtkit.Session) -> None:
    session2.execute("import torch\nfrom torch.distributed.nn.functional import all_reduce")
    session2.reset_group()
    found = session2.execute("float(all_reduce(torch.ones(1)))").results
    assert found == {0: "2.0", 1: "2.0"}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_fail_and_keep_no_dead_group(session2: dtkit.Session, case: str) -> None:
    session2.execute("import gc, os\n" + SETUP)
    before = [num_threads for _, num_threads in held(session2)]
    check(session2, *CASES[case])
    session2.execute("group = None")  # whoever keeps one keeps its threads
    assert [num_threads for _, num_threads in held(session2)] == before


RUN = """
plain = nn.Linear(4, 1)
optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for i in range(9):
    optimizer.zero_grad()
    plain(x).sum().backward()
    if rank == 1 and i == 3:
        raise ValueError('boom')
    optimizer.step()
"""


def test_a_failed_run_keeps_no_dead_group(session2: dtkit.Session) -> None:
    session2.execute("import gc, os\n" + SETUP)
    before = [num_threads for _, num_threads in held(session2)]
    with pytest.raises(RankError):
        session2.train(RUN)
    assert [num_threads for _, num_threads in held(session2)] == before
