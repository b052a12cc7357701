"""Horovod's collectives on four ranks: every form, process sets, join, and disagreements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import dtkit

SETUP = """
import torch
import horovod.torch as hvd
hvd.init()
me, num = hvd.rank(), hvd.size()

def raises(kind, text, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise SystemError(f"no {kind.__name__}: {text}")
"""


@pytest.fixture
def four(session4: dtkit.Session) -> dtkit.Session:
    session4.execute(SETUP)  # each time: after a test that fails the group is a new one
    return session4


def test_where_each_rank_is(four: dtkit.Session) -> None:
    four.execute("""
assert (me, num) == (rank, world_size)
assert (hvd.local_rank(), hvd.local_size()) == (local_rank, 4)
assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
assert hvd.is_initialized() and hvd.is_homogeneous() and hvd.gloo_built()
""")


def test_every_operation(four: dtkit.Session) -> None:
    four.execute("""
x = torch.tensor([1.0, -2.0]) * (me + 1)
for op, expected in [
    (hvd.Average, [2.5, -5.0]), (hvd.Sum, [10.0, -20.0]), (hvd.Min, [1.0, -8.0]),
    (hvd.Max, [4.0, -2.0]), (hvd.Product, [24.0, 384.0]),
]:
    assert hvd.allreduce(x, op=op).tolist() == expected, op
assert hvd.allreduce(torch.tensor([me, -me])).tolist() == [1, -1]          # towards zero
assert hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)[0] == 20.0
one = torch.eye(4)[me]                                       # orthogonal: Adasum adds
assert torch.allclose(hvd.allreduce(one, op=hvd.Adasum), torch.ones(4))
assert torch.allclose(hvd.allreduce(torch.ones(3), op=hvd.Adasum), torch.ones(3))  # averages
raises(ValueError, "not both", hvd.allreduce, x, average=True, op=hvd.Sum)
""")


def test_small_tensors_travel_with_what_is_submitted_and_large_ones_alike(
    four: dtkit.Session,
) -> None:
    four.execute("""
from dtkit.horovod.context import current
kinds = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.uint8, torch.int8, torch.int32, torch.int64,
]
for kind in kinds:
    torch.manual_seed(me)
    x = torch.randint(30, (1_500_000,)).to(kind)
    for op in hvd.Sum, hvd.Average:
        large = hvd.allreduce(x, op=op)
        small = hvd.allreduce(x[:1000], op=op)
        assert torch.equal(small, large[:1000]), kind
        assert torch.equal(hvd.allreduce_(x[:1000].clone(), op=op), small)
    whole = [torch.empty_like(x) for _ in range(num)] if kind is torch.float32 else []
    if whole:
        torch.distributed.all_gather(whole, x)
        assert torch.equal(hvd.allreduce(x, op=hvd.Sum), sum(whole))
empty = hvd.allreduce(torch.ones(0, 3))
assert empty.shape == (0, 3)
one, two = hvd.grouped_allreduce([torch.ones(2), torch.ones(3, dtype=torch.int64)], op=hvd.Sum)
assert one.tolist() == [4.0] * 2 and two.tolist() == [4] * 3
""")


def test_tensors_that_lie_in_others_are_summed_alone(four: dtkit.Session) -> None:
    four.execute("""
import numpy as np
for rows in 4, 3_000_000:                                   # small, and over gloo
    table = torch.full((rows, 2), float(me))
    hvd.allreduce_(table[:, 0], op=hvd.Sum)
    assert (table[:, 0] == 6.0).all() and (table[:, 1] == me).all(), rows
z = torch.full((3,), 1j)
negative = z.conj().imag                                    # a view that negates
assert hvd.allreduce(negative, op=hvd.Sum).tolist() == [-4.0] * 3
hvd.allreduce_(negative, op=hvd.Sum)
assert z.imag.tolist() == [4.0] * 3
halved = hvd.allreduce(torch.ones(2), op=hvd.Sum, prescale_factor=np.float32(0.5))
assert halved.tolist() == [2.0, 2.0]
""")


def test_results_are_let_go_of_when_the_user_does(four: dtkit.Session) -> None:
    four.execute("""
import weakref
result = hvd.allreduce(torch.ones(2))
seen = weakref.ref(result)
del result
assert seen() is None
handle = hvd.allreduce_async(torch.ones(2))
result = weakref.ref(hvd.synchronize(handle))
del handle
assert result() is None
""")


def test_a_stopped_rank_keeps_the_others_only_from_what_needs_it(four: dtkit.Session) -> None:
    four.execute("""
import os, signal, time
from pathlib import Path
others = hvd.add_process_set([0, 1, 2])
pids = hvd.allgather(torch.tensor([os.getpid()])).tolist()
x = torch.full((300_000,), float(me))

def submit():  # 48 MB: more than connections hold
    return [hvd.allreduce_async(x, op=hvd.Sum, name=f"t{i}") for i in range(40)]

if me == 3:
    handles = submit()
    os.kill(os.getpid(), signal.SIGSTOP)  # until rank 0 lets it go on
else:
    while " T " not in Path(f"/proc/{pids[3]}/stat").read_text():
        time.sleep(0.01)
    handles = submit()
    sums = [hvd.synchronize(handle) for handle in handles]
    assert hvd.allreduce(x, op=hvd.Sum, process_set=others)[-1] == 3.0
    if me == 0:
        os.kill(pids[3], signal.SIGCONT)
sums = [hvd.synchronize(handle) for handle in handles]
assert all((total == 6.0).all() for total in sums)
assert hvd.remove_process_set(others)
""")


def test_forms_in_place_grouped_async_and_in_any_order(four: dtkit.Session) -> None:
    four.execute("""
x = torch.full((2,), float(me))
assert hvd.allreduce_(x) is x and x.tolist() == [1.5, 1.5]
a, b = hvd.grouped_allreduce([torch.ones(2), torch.ones(3, dtype=torch.int64)], op=hvd.Sum)
assert a.tolist() == [4.0] * 2 and b.tolist() == [4] * 3
names = ["a", "b", "c", "d"]
order = names[me:] + names[:me]                              # another order on each rank
handles = {n: hvd.allreduce_async(torch.tensor([float(ord(n))]), name=n) for n in order}
for n in reversed(names):
    assert hvd.synchronize(handles[n]).item() == ord(n) and hvd.poll(handles[n])
sparse = torch.sparse_coo_tensor([[me, 4]], [1.0, 1.0], (5,))
assert hvd.sparse_allreduce_async(sparse, "s", hvd.Sum)().to_dense().tolist() == [1, 1, 1, 1, 4]
""")


def test_sizes_that_differ_by_rank(four: dtkit.Session) -> None:
    four.execute("""
rows = torch.full((me, 2), me, dtype=torch.int16)            # rank 0 has none
assert hvd.allgather(rows)[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
assert hvd.allgather(torch.tensor([me % 2 == 0])).tolist() == [True, False] * 2
splits = [r for r in range(4)]                               # r rows for rank r
sent = torch.cat([torch.full((r,), 10 * me + r) for r in range(4)])
out, received = hvd.alltoall(sent, splits=torch.tensor(splits))
assert received.tolist() == [me] * 4
assert out.tolist() == [10 * r + me for r in range(4) for _ in range(me)]
assert hvd.alltoall(torch.arange(4) + 10 * me).tolist() == [me, 10 + me, 20 + me, 30 + me]
part = hvd.reducescatter(torch.arange(6.0), op=hvd.Sum)      # 2, 2, 1 and 1 rows
assert part.tolist() == [[0.0, 4.0], [8.0, 12.0], [16.0], [20.0]][me]
assert hvd.broadcast(torch.tensor(me), root_rank=2).item() == 2
assert hvd.allgather_object({"rank": me})[3] == {"rank": 3}
raises(ValueError, "a scalar has none", hvd.allgather, torch.tensor(1.0))
raises(ValueError, "do not divide", hvd.alltoall, torch.ones(5))
""")


def test_gradients_flow_through(four: dtkit.Session) -> None:
    four.execute("""
def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad.tolist()
x = torch.ones(4)
assert gradient(lambda t: hvd.allreduce(t, op=hvd.Sum), x) == [4.0] * 4
assert gradient(hvd.allreduce, x) == [1.0] * 4
assert gradient(lambda t: hvd.allgather(t) * me, x) == [1.5] * 4
assert gradient(lambda t: hvd.broadcast(t, 1), x) == [float(me == 1)] * 4
assert gradient(lambda t: hvd.alltoall(t) * me, x) == [0.0, 1.0, 2.0, 3.0]
assert gradient(lambda t: hvd.reducescatter(t, op=hvd.Sum), x) == [4.0] * 4
""")


def test_process_sets(four: dtkit.Session) -> None:
    four.execute("""
even, odd = hvd.add_process_set([0, 2]), hvd.add_process_set(hvd.ProcessSet([1, 3]))
mine = even if even.included() else odd
assert mine.size() == 2 and mine.rank() == me // 2
assert hvd.allreduce(torch.tensor([float(me)]), process_set=mine).item() == 1 + me % 2
assert hvd.broadcast(torch.tensor(me), 2 + me % 2, process_set=mine).item() == 2 + me % 2
hvd.barrier(process_set=mine)
other = odd if mine is even else even
raises(ValueError, "does not include this rank", hvd.allreduce, torch.ones(1), process_set=other)
raises(ValueError, "is not in", hvd.broadcast, torch.ones(1), 1 - me % 2, process_set=mine)
model = torch.nn.Linear(2, 1)
hvd.broadcast_parameters(model.state_dict(), 0)
opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), process_set=even)
model(torch.full((1, 2), float(me))).sum().backward()
assert model.weight.grad[0, 0].item() == (1.0 if even.included() else me)
opt.step()
for compression in (hvd.Compression.int8, hvd.Compression.topk(0.5), hvd.Compression.powersgd(1)):
    model = torch.nn.Linear(64, 64)
    hvd.broadcast_parameters(model.state_dict(), 0)
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        process_set=mine, compression=compression)
    for step in range(3):
        opt.zero_grad()
        model(torch.full((2, 64), float(me + step))).square().mean().backward()
        opt.step()
    sums = hvd.allgather(model.weight.detach().double().sum().reshape(1))
    assert sums[0] == sums[2] and sums[1] == sums[3] and sums[0] != sums[1]
assert hvd.remove_process_set(even) and hvd.remove_process_set(odd)
assert not hvd.remove_process_set(hvd.global_process_set)
raises(ValueError, "not registered", hvd.allreduce, torch.ones(1), process_set=mine)
""")


def test_ranks_with_less_data_join(four: dtkit.Session) -> None:
    four.execute("""
torch.manual_seed(0)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
for step in range(1 + me):                                   # 1, 2, 3 and 4 batches
    opt.zero_grad()
    (-model(torch.ones(1, 1))).sum().backward()
    opt.step()
assert hvd.join() == 3
# Step k has 4 - k ranks, whose gradients count as 1/4 each; who joined has not stepped since.
assert abs(model.weight.item() - sum((4 - k) / 4 for k in range(1 + me))) < 1e-6
assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 4.0   # and unnamed tensors agree again
""")


def test_whoever_leaves_and_comes_back_keeps_nothing_of_before(four: dtkit.Session) -> None:
    four.execute("""
import gc, os
def held():
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
hvd.shutdown()
after = []
for _ in range(4):
    hvd.init()
    hvd.allreduce(torch.ones(1))
    hvd.shutdown()
    after.append(held())
assert len(set(after[1:])) == 1, after  # the first takes away what was left before
""")


def test_disagreements_are_errors_on_all_ranks(four: dtkit.Session) -> None:
    four.execute("""
error = hvd.HorovodInternalError
raises(error, "rank 0 has shape [[2]], rank 3 has shape [[3]]",
       hvd.allreduce, torch.ones(3 if me == 3 else 2), name="shape")
mixed = torch.ones(2, dtype=torch.int32 if me % 2 else torch.float32)
raises(error, "rank 0 has dtype", hvd.allreduce, mixed)
raises(error, "rank 0 has op", hvd.allreduce, torch.ones(2), op=[hvd.Sum, hvd.Min][me % 2])
raises(error, "rank 0 has root 0, rank 1 has root 1", hvd.broadcast, torch.ones(2), me % 2)
raises(error, "every rank waits, and not for the same", hvd.allreduce, torch.ones(2), name=f"{me}")
if me > 0:
    hvd.barrier()                                            # so that rank 0's cannot be done
handle = hvd.allreduce_async(torch.ones(2), name="twice")
if me == 0:
    raises(ValueError, "is being processed", hvd.allreduce_async, torch.ones(2), name="twice")
    hvd.barrier()
assert hvd.synchronize(handle).tolist() == [1.0, 1.0]
""")
