"""One rank fails: the others are freed wherever they wait, and the next cell finds everything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    import dtkit

ANSI = re.compile(r"\x1b\[[0-9;]*m")

SETUP = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        raise ValueError('in backward')

kept = rank + 10
net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
model = DistributedDataParallel(net)
optimizer = torch.optim.Adam(model.parameters())
x = torch.ones(2, 4)
model(x).sum().backward()
optimizer.step()
def train():
    assert rank == dist.get_rank()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    return round(float(sum(p.double().sum() for p in net.parameters())), 9)
"""
GO_ON = "train()"

FORWARD = """\
dist.barrier()
if rank == 1:
    raise ValueError('boom')
dist.all_reduce(torch.ones(1))
"""
IN_BACKWARD = """\
dist.barrier()
y = model[0](x) if False else model.module[0](x)
if rank == 1:
    y = Fails.apply(y)
loss = model(x) if rank != 1 else model(Fails.apply(x.clone().requires_grad_()))
(loss.sum() + y.sum()).backward()
"""
SUBGROUP = """\
group = dist.new_group([0, 1])
dist.barrier()
if rank == 1:
    raise ValueError('boom')
if rank == 0:
    dist.all_reduce(torch.ones(1), group=group)
"""
MAKING_A_GROUP = """\
dist.barrier()
if rank == 1:
    raise ValueError('boom')
group = dist.new_group([0, 1])
"""
WORKERS = """\
loader = DataLoader(list(range(64)), batch_size=2, num_workers=2)
for i, batch in enumerate(loader):
    if rank == 1 and i == 3:
        raise ValueError('boom')
    dist.all_reduce(batch.float())
"""
BUCKETS = """\
fresh = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
fresh(x).sum().backward()
if rank == 1:
    raise ValueError('boom')
fresh(x)
"""
SENDING = """\
dist.barrier()
if rank == 1:
    raise ValueError('boom')
dist.send(torch.ones(2_000_000), dst=1)
"""
CASES = {
    "forward": (FORWARD, "in all_reduce (cell line 4)"),
    "backward": (IN_BACKWARD, "(cell line 6)"),
    "buckets": (BUCKETS, "in broadcast (cell line 5)"),
    "subgroup": (SUBGROUP, "in all_reduce"),
    "new-group": (MAKING_A_GROUP, "in new_group"),
    "sending": (SENDING, "in send (cell line 4)"),
    "workers": (WORKERS, "in all_reduce (cell line 5)"),
}


def fail(session: dtkit.Session, cell: str) -> RankError:
    with pytest.raises(RankError) as caught:
        session.execute(cell)
    return caught.value


def assert_all_is_well(session: dtkit.Session) -> None:
    """State is there, and the model that was there before trains on, equal on all ranks."""
    results = session.execute("kept, round(float(torch.ones(1)), 1)").results
    assert results == {rank: f"({rank + 10}, 1.0)" for rank in session.ranks}
    assert len(set(session.execute(GO_ON).results.values())) == 1


def check(session: dtkit.Session, cell: str, where: str) -> None:
    error = fail(session, cell)
    assert {(f.rank, f.ename) for f in error.causes} == {(1, "ValueError")}, str(error)
    assert where in error.epilogue
    assert error.epilogue.endswith("; group rebuilt; state kept")
    assert_all_is_well(session)


@pytest.fixture(scope="module")
def prepared(session4: dtkit.Session) -> dtkit.Session:
    """Four ranks that have trained a model of PyTorch's own DistributedDataParallel."""
    session4.execute(SETUP)
    return session4


@pytest.mark.parametrize("case", CASES)
def test_a_failing_rank_frees_the_others(prepared: dtkit.Session, case: str) -> None:
    check(prepared, *CASES[case])


def test_the_cause_is_shown_once_with_the_users_frames(prepared: dtkit.Session) -> None:
    prepared.execute("def forward(batch):\n    return nn.Linear(3, 1)(batch)")
    cell = "if rank == 1:\n    forward(torch.ones(2, 4))\ndist.barrier()"
    error = fail(prepared, cell)
    text = ANSI.sub("", "\n".join(error._render_traceback_()))
    assert text.startswith("── rank 1, cell line 2 ──")
    assert text.count("mat1 and mat2 shapes cannot be multiplied") == 1
    assert "return nn.Linear(3, 1)(batch)" in text
    assert "frames in torch]" in text
    assert "site-packages" not in text
    assert "(ranks 0, 2, 3 failed as a consequence)" in text
    assert "ranks 0, 2, 3 were in barrier (cell line 3) and were released" in text
    assert_all_is_well(prepared)


def test_ranks_of_a_run_that_are_freed_lose_no_step(prepared: dtkit.Session) -> None:
    """A plain cell under `%%dist_train` fails on one rank; the model it trained trains on."""
    cell = """\
plain = nn.Linear(4, 1)
plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for step in range(20):
    plain_optimizer.zero_grad()
    loss = plain(x).sum()
    if rank == 1 and step == 7:
        raise ValueError('boom')
    loss.backward()
    plain_optimizer.step()
"""
    with pytest.raises(RankError, match="boom") as caught:
        prepared.train(cell)
    assert "(cell line 8) and were released" in caught.value.epilogue
    assert prepared.execute("step").results == dict.fromkeys(range(4), "7")
    weights = "[p.tolist() for p in plain.parameters()]"
    assert len(set(prepared.execute(weights).results.values())) == 1
    assert_all_is_well(prepared)


def test_a_rank_that_waits_at_the_runs_end_is_freed(prepared: dtkit.Session) -> None:
    """The others have come to the cell's end, and take a last checkpoint together."""
    cell = """\
plain = nn.Linear(4, 1)
plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for step in range(3):
    plain_optimizer.zero_grad()
    plain(x).sum().backward()
    plain_optimizer.step()
assert rank != 1, 'after the last step'
"""
    with pytest.raises(RankError, match="after the last step") as caught:
        prepared.train(cell, options=RunOptions(checkpoint_every=100))
    assert "group rebuilt; state kept" in caught.value.epilogue
    assert_all_is_well(prepared)


def test_all_ranks_failing_alike_break_nothing(prepared: dtkit.Session) -> None:
    error = fail(prepared, "1 / 0")
    assert error.epilogue == ""
    assert str(error) == "ranks 0, 1, 2, 3: ZeroDivisionError: division by zero (cell line 1)"


def test_a_rank_in_python_is_stopped_too(prepared: dtkit.Session) -> None:
    error = fail(prepared, "if rank == 2:\n    1 / 0\nwhile True: pass")
    assert "in Python (cell line 3) and were stopped" in error.epilogue
    assert_all_is_well(prepared)


def test_a_stop_before_a_runs_cell_keeps_it_from_running(prepared: dtkit.Session) -> None:
    """Three ranks wait for the fourth to make a model equal; they would go on into the cell."""
    prepared.execute("""\
import time
plain, has_run = nn.Linear(4, 1), False
def late(info):
    get_ipython().events.unregister("pre_run_cell", late)
    if rank == 1:
        time.sleep(600)
get_ipython().events.register("pre_run_cell", late)
""")
    cell = "has_run = True\nplain\ntime.sleep(600)"
    run, steps = prepared.training(cell)
    is_asked = False
    for _ in steps:
        waiting = [place.rank for place in prepared.where() if place.operation]
        if waiting == [0, 2, 3] and not is_asked:
            is_asked = True
            run.requests.stop_now()
        run.requests.alarm.wait(0.02)
    assert run.state == "stopped"
    assert prepared.execute("has_run").results == dict.fromkeys(range(4), "False")
    assert_all_is_well(prepared)


def test_an_interrupt_reaches_ranks_that_have_not_come_to_the_cell_yet(
    prepared: dtkit.Session,
) -> None:
    prepared.execute("""\
import time
get_ipython().kernel.io_loop.call_later(0.01, time.sleep, 1.0)  # the next cell waits meanwhile
""")
    _, requests, steps = prepared.running("for _ in range(200): time.sleep(0.1)")
    requests.interrupt()
    for _ in steps:
        requests.alarm.wait(0.02)
    assert max(map(int, prepared.execute("_").results.values())) < 199  # where they were stopped
    assert_all_is_well(prepared)


@pytest.mark.parametrize("call", ["exit()", "quit()", "import sys\nsys.exit(3)"])
def test_a_cell_that_exits_ends_and_the_rank_stays(prepared: dtkit.Session, call: str) -> None:
    with pytest.raises(RankError, match="SystemExit"):
        prepared.execute(call)
    # What ipykernel would end the engine for, a moment later.
    assert set(prepared.execute("get_ipython().exit_now").results.values()) == {"False"}
    assert_all_is_well(prepared)


def test_the_client_keeps_no_text_of_a_cell(prepared: dtkit.Session) -> None:
    """It would join it all, anew with every message."""
    client = prepared._engines._client
    output, requests, steps = prepared.running("for _ in range(50): print(999 * 'x', flush=True)")
    most = 0
    for _ in steps:
        kept = [m for m in list(client.metadata.values()) if isinstance(m, dict)]
        most = max([most, *(len(m["stdout"] or "") for m in kept)])
        requests.alarm.wait(0.001)
    assert len(output.text_of(0)) == 50_000
    assert most < 10_000


def test_a_child_of_a_cell_ends_where_the_cell_does(prepared: dtkit.Session) -> None:
    """It would go on as a second kernel, and `waitpid` wait for ever."""
    cell = """\
import os
pid = os.fork()
if pid == 0:
    {child}
os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
    statuses = prepared.execute(cell.format(child="raise ValueError('in the child')")).results
    assert statuses == dict.fromkeys(range(4), "1")
    prepared.execute("child = os.fork()")
    statuses = prepared.execute("os.waitpid(child, 0)[1]").results
    assert statuses == dict.fromkeys(range(4), "0")
    assert_all_is_well(prepared)


def test_a_child_of_a_cell_ends_by_sigterm(prepared: dtkit.Session) -> None:
    """It would keep the engine's own handler, and whoever ends a pool wait for ever."""
    cell = """\
import time
from multiprocessing import Process
child = Process(target=time.sleep, args=(600,))
child.start()
child.terminate()
child.join()
child.exitcode
"""
    assert prepared.execute(cell).results == dict.fromkeys(range(4), "-15")


def test_a_thread_in_a_collective_is_freed_with_the_group(prepared: dtkit.Session) -> None:
    prepared.execute("""\
import threading
freed = []
def wait():
    try:
        dist.recv(torch.ones(1), src=(rank + 1) % 4)
    except RuntimeError as error:
        freed.append(type(error).__name__)
thread = threading.Thread(target=wait)
thread.start()
""")
    prepared.reset_group()
    done = prepared.execute("thread.join(10)\nthread.is_alive(), freed").results
    assert done == dict.fromkeys(range(4), "(False, ['RuntimeError'])")
    assert_all_is_well(prepared)


def test_an_interrupt_leaves_no_mode_of_torch_switched(prepared: dtkit.Session) -> None:
    """As one does that arrives within `__enter__` of `torch.no_grad`."""
    modes = "torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')"
    switch = "torch.set_grad_enabled(False)\ntorch.set_autocast_enabled('cpu', True)"
    with pytest.raises(RankError):
        prepared.execute(f"{switch}\nraise KeyboardInterrupt")
    assert set(prepared.execute(modes).results.values()) == {"(True, False)"}
    prepared.execute(switch)
    assert set(prepared.execute(modes).results.values()) == {"(False, True)"}
    prepared.execute("torch.set_grad_enabled(True)\ntorch.set_autocast_enabled('cpu', False)")
