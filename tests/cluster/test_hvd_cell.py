"""Horovod's interface in cells: the lecture's cell, and the rules of `DistributedOptimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

LECTURE = """
import torch
import torch.nn as nn
import torch.optim as optim
from torch.utils.data import DataLoader, TensorDataset
import horovod.torch as hvd

hvd.init()
torch.manual_seed(42)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 1)

    def forward(self, x):
        return self.linear(x)

model = Model()
criterion = nn.MSELoss()
optimizer = optim.SGD(model.parameters(), lr=0.01)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

data = TensorDataset(torch.randn(640, 10), torch.randn(640, 1))
loader = DataLoader(data, batch_size=32)

losses = []
for epoch in range(2):
    for batch_idx, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        output = model(x)
        loss = criterion(output, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if batch_idx % 10 == 0:
            print(f"Epoch {epoch} Batch {batch_idx} Loss {loss.item():.4f}")
"""

SETUP = """
import torch, warnings
from torch import nn
import horovod.torch as hvd
hvd.init()

def make(seed=0, **options):
    "Return a model, the same on all ranks, and its optimizer."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    lr = options.pop("lr", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), **options
    )

def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator)

def grads_of(model, x):
    "Return what one backward pass on one rank gives."
    copy = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    copy.load_state_dict(model.state_dict())
    copy(x).pow(2).mean().backward()
    return [p.grad for p in copy.parameters()]

def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))

def grads(model):
    return [p.grad for p in model.parameters()]

def total(lists):
    return [sum(parts) for parts in zip(*lists, strict=True)]
"""


@pytest.fixture(scope="module")
def rig(rig2: Rig) -> Rig:
    rig2.session.execute(SETUP)
    return rig2


def test_the_lectures_cell_runs_unedited(rig: Rig) -> None:
    run = rig.session.train(LECTURE)
    assert run.state == "finished"
    assert rig.common("len(losses)") == 40
    assert rig.common("losses[-1]") < rig.common("losses[0]")
    rig.assert_same_weights("model")
    assert rig.common("hvd.__name__") == "dtkit.horovod.torch"
    assert [n for n in run.notes if "hvd.DistributedOptimizer combines its gradients" in n]
    # The plain cell's help stands back: every rank sees the whole loader, as Horovod has it.
    assert not [n for n in run.notes if "sharded" in n]


def test_a_later_cell_that_uses_the_optimizer_is_left_alone_too(rig: Rig) -> None:
    rig.session.train(LECTURE)
    run = rig.session.train("""
num_batches = 0
for x, y in DataLoader(data, batch_size=32, shuffle=True):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    num_batches += 1
""")
    assert rig.common("num_batches") == 20
    assert not [n for n in run.notes if "sharded" in n]
    rig.assert_same_weights("model")


def test_waiting_for_gradients_is_seen(rig: Rig) -> None:
    run = rig.session.train(LECTURE, options=RunOptions(timeline=""))
    assert (run.history["comm_ms"] > 0).all()
    analysis = run.timeline().analysis
    assert analysis.share("exposed") > 0


def test_an_option_names_the_interface(rig: Rig) -> None:
    options = RunOptions(hvd="dtkit")
    rig.session.train("import horovod.torch\nname = horovod.torch.__name__", options=options)
    assert rig.common("name") == "dtkit.horovod.torch"


def test_it_is_the_users_class_with_the_users_options(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make()
assert isinstance(opt, torch.optim.SGD) and type(opt).__name__ == "SGD"
assert opt.param_groups[0]["lr"] == 0.5
scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.1)
opt.zero_grad(); model(batch(0)).mean().backward(); opt.step(); scheduler.step()
assert abs(opt.param_groups[0]["lr"] - 0.05) < 1e-9
""")


def test_gradients_are_averages_when_backward_returns(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make()
expected = [g / 2 for g in total([grads_of(model, batch(r)) for r in range(2)])]
model(batch(hvd.rank())).pow(2).mean().backward()
assert close(grads(model), expected)
opt.step()
""")


def test_passes_are_summed_and_not_divided(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make(backward_passes_per_step=2)
passes = [grads_of(model, batch(10 * p + r)) for p in range(2) for r in range(2)]
expected = [g / 2 for g in total(passes)]
for p in range(2):
    model(batch(10 * p + hvd.rank())).pow(2).mean().backward()
assert close(grads(model), expected)
opt.step()
try:
    for p in range(3):
        model(batch(p)).pow(2).mean().backward()
    raise SystemError("no error")
except AssertionError as error:
    assert "more than backward_passes_per_step times" in str(error)
opt.step()
""")


def test_sum_predivide_and_compression(rig: Rig) -> None:
    rig.session.execute("""
sums = total([grads_of(make()[0], batch(r)) for r in range(2)])
for options, factor, atol in [
    (dict(op=hvd.Sum), 1, 1e-6), (dict(gradient_predivide_factor=4.0), 0.5, 1e-6),
    (dict(compression=hvd.Compression.fp16), 0.5, 1e-3), (dict(num_groups=2), 0.5, 1e-6),
]:
    model, opt = make(**options)
    model(batch(hvd.rank())).pow(2).mean().backward()
    for got, wanted in zip(grads(model), sums, strict=True):
        assert torch.allclose(got, wanted * factor, atol=atol), options
    opt.step()
model, opt = make(groups=[list(make()[0].parameters())[:0]])
params = list(model.parameters())
opt = hvd.DistributedOptimizer(torch.optim.SGD(params, 0.1), groups=[params[:2]])
model(batch(hvd.rank())).pow(2).mean().backward()
assert close(grads(model), [g / 2 for g in sums])
""")


def test_a_parameter_that_one_rank_uses_is_averaged_with_zero(rig: Rig) -> None:
    rig.session.execute("""
torch.manual_seed(1)
shared, own, unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
opt = hvd.DistributedOptimizer(torch.optim.SGD(
    [*shared.parameters(), *own.parameters(), *unused.parameters()], lr=0.1, weight_decay=0.1))
before = unused.weight.detach().clone()
x = torch.ones(2, 3)
opt.zero_grad()
y = shared(x)
(own(y) if hvd.rank() == 0 else y).sum().backward()
opt.step()
assert unused.weight.grad is not None and not unused.weight.grad.any()
assert not torch.equal(unused.weight, before), "a zero gradient decays weights"
for p in [*shared.parameters(), *own.parameters(), *unused.parameters()]:
    everyones = hvd.allgather(p.detach().reshape(1, -1))
    assert torch.equal(everyones[0], everyones[1])
""")


def test_two_losses_of_two_parts_of_a_model_need_no_more_than_one_pass_each(rig: Rig) -> None:
    rig.session.execute("""
torch.manual_seed(2)
a, b = nn.Linear(3, 1), nn.Linear(3, 1)
both = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
opt = hvd.DistributedOptimizer(both, op=hvd.Sum)
x = torch.full((1, 3), float(hvd.rank() + 1))
opt.zero_grad()
a(x).sum().backward()
b(x).sum().backward()
assert torch.equal(a.weight.grad, torch.full((1, 3), 3.0)), a.weight.grad
assert torch.equal(b.weight.grad, torch.full((1, 3), 3.0)), b.weight.grad
opt.step()
assert torch.equal(a.weight.grad, torch.full((1, 3), 3.0)), "the step reduces nothing again"
""")


def test_amp_clipping_and_set_to_none_need_no_synchronize(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make()
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
for i in range(4):
    opt.zero_grad(set_to_none=i % 2 == 0)
    loss = model(batch(2 * i + hvd.rank())).pow(2).mean()
    if i == 2 and hvd.rank() == 1:
        loss = loss * float("inf")   # on one rank: both skip this step
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)
    scaler.update()
assert scaler.get_scale() == 2.0**3
flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
everyones = hvd.allgather(flat.reshape(1, -1))
assert torch.equal(everyones[0], everyones[1]) and everyones.isfinite().all()
""")


def test_synchronize_and_its_warnings(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make()
model(batch(0)).mean().backward()
opt.synchronize()
with opt.skip_synchronize():
    opt.step()
model(batch(0)).mean().backward()
opt.synchronize()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    opt.step()
assert "without optimizer.skip_synchronize()" in str(seen[0].message)
model, opt = make(backward_passes_per_step=2)
model(batch(0)).mean().backward()
try:
    opt.zero_grad()
    raise SystemError("no error")
except AssertionError as error:
    assert "before optimizer.step()" in str(error)
opt.synchronize(); opt.step()
""")


def test_arguments_that_cannot_be_are_refused(rig: Rig) -> None:
    rig.session.execute("""
model = nn.Linear(2, 2)
def fails(text, params=None, **options):
    try:
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), params, **options)
    except ValueError as error:
        assert text in str(error), error
    else:
        raise SystemError(text)
fails("tuples", model.parameters())
fails("twice: weight", [("weight", model.weight), ("weight", model.bias)])
fails("lacks 1", [("weight", model.weight)])
fails("op=hvd.Average", gradient_predivide_factor=2.0, op=hvd.Sum)
fails("at least 1", backward_passes_per_step=0)
""")


def test_sparse_gradients(rig: Rig) -> None:
    rig.session.execute("""
for sparse_as_dense in (False, True):
    torch.manual_seed(3)
    emb = nn.Embedding(6, 2, sparse=True)
    opt = hvd.DistributedOptimizer(
        torch.optim.SparseAdam(list(emb.parameters())), sparse_as_dense=sparse_as_dense)
    for step in range(3):
        opt.zero_grad()
        emb(torch.tensor([0, 1 + hvd.rank()])).sum().backward()
        expected = torch.zeros(6, 2); expected[0] = 1.0; expected[1:3] = 0.5
        assert emb.weight.grad.is_sparse
        assert torch.equal(emb.weight.grad.to_dense(), expected), (sparse_as_dense, step)
        opt.step()
    everyones = hvd.allgather(emb.weight.detach().reshape(1, -1))
    assert torch.equal(everyones[0], everyones[1])
""")


def test_adasum_combines_the_changes(rig: Rig) -> None:
    rig.session.execute("""
model, opt = make(op=hvd.Adasum, lr=0.5)
start = [p.detach().clone() for p in model.parameters()]
deltas = [[-0.5 * g for g in grads_of(model, batch(r))] for r in range(2)]
def adasum(a, b):
    dot, aa, bb = (a * b).sum(), (a * a).sum(), (b * b).sum()
    return (1 - dot / (2 * aa)) * a + (1 - dot / (2 * bb)) * b
model(batch(hvd.rank())).pow(2).mean().backward()
opt.step()
changes = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
assert close(changes, [adasum(a, b) for a, b in zip(*deltas, strict=True)])
""")


def test_a_model_and_an_optimizer_are_made_equal(rig: Rig) -> None:
    rig.session.execute("""
torch.manual_seed(hvd.rank())
model = nn.Linear(3, 2)
opt = torch.optim.Adam(model.parameters(), lr=0.1 * (hvd.rank() + 1))
if hvd.rank() == 0:
    model(torch.ones(1, 3)).sum().backward(); opt.step()
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(opt, root_rank=0)
assert opt.param_groups[0]["lr"] == 0.1
state = {k: {n: t.tolist() for n, t in s.items()} for k, s in opt.state_dict()["state"].items()}
assert hvd.allgather_object(state) == [state] * 2 and len(state) == 2
assert hvd.allgather_object(model.weight.tolist()) == [model.weight.tolist()] * 2
assert hvd.broadcast_object({"of": hvd.rank()}, root_rank=1) == {"of": 1}
""")


def test_batch_statistics_are_those_of_all_ranks_on_cpu(rig: Rig) -> None:
    rig.session.execute("""
generator = torch.Generator().manual_seed(0)
x = torch.randn(7, 4, 3, generator=generator, dtype=torch.float64) + 5
first = x[:4] if hvd.rank() == 0 else x[4:]          # 4 and 3 samples
weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
mine = weights[:4] if hvd.rank() == 0 else weights[4:]
whole = nn.BatchNorm1d(4).double(); synced = hvd.SyncBatchNorm(4).double()
a, b = x.clone().requires_grad_(), first.clone().requires_grad_()
y, z = whole(a), synced(b)
part = y[:4] if hvd.rank() == 0 else y[4:]
assert torch.allclose(part, z)
assert torch.allclose(whole.running_var, synced.running_var)
assert torch.allclose(whole.running_mean, synced.running_mean)
(y * weights).sum().backward(); (z * mine).sum().backward()
assert torch.allclose(a.grad[:4] if hvd.rank() == 0 else a.grad[4:], b.grad)
assert torch.allclose(hvd.allreduce(synced.weight.grad, op=hvd.Sum), whole.weight.grad)
synced.eval(); whole.eval()
assert torch.allclose(synced(first), whole(first))
""")


def test_names_that_differ_are_an_error_on_both_ranks(rig: Rig) -> None:
    rig.session.execute("""
try:
    hvd.allreduce(torch.ones(2), name=f"only_{hvd.rank()}")
    raise SystemError("no error")
except hvd.HorovodInternalError as error:
    assert "rank 0 for 'allreduce.only_0'; rank 1 for 'allreduce.only_1'" in str(error), error
assert hvd.allreduce(torch.ones(2)).tolist() == [1.0, 1.0]
""")


def test_a_rank_that_fails_frees_the_one_that_waits_for_it(rig: Rig) -> None:
    with pytest.raises(RankError) as caught:
        rig.session.execute("""
if hvd.rank() == 1:
    raise KeyError("lost")
hvd.allreduce(torch.ones(2))
""")
    assert [(f.rank, f.ename) for f in caught.value.causes] == [(1, "KeyError")]
    assert len(caught.value.failures) == 2
    # The group was rebuilt: the interface says what to do, and does it.
    with pytest.raises(RankError, match=r"call hvd.init\(\) again"):
        rig.session.execute("hvd.allreduce(torch.ones(2))")
    rig.session.execute("hvd.init()\nassert hvd.allreduce(torch.ones(2)).tolist() == [1.0, 1.0]")


def test_after_an_interrupt_nothing_of_before_is_waited_for_or_added_up(rig: Rig) -> None:
    rig.session.execute("model, opt = make()")
    _, requests, steps = rig.session.running("""
import threading
if hvd.rank() == 1:
    threading.Event().wait()
model(batch(0)).sum().backward()
""")
    while [place["state"] for place in rig.places()] != ["collective", "python"]:
        next(steps)
    requests.interrupt()
    for _ in steps:
        rig.places()
    with pytest.raises(RankError, match=r"call hvd.init\(\) again"):
        rig.session.execute("hvd.allreduce(torch.ones(2))")
    rig.session.execute("""
hvd.init()
assert hvd.allreduce(torch.ones(2)).tolist() == [1.0, 1.0]
opt.zero_grad()
model(batch(hvd.rank())).mean().backward()
opt.step()
""")
    rig.assert_same_weights("model")


def test_a_run_on_some_ranks_is_told_to_use_a_process_set(rig: Rig) -> None:
    with pytest.raises(RankError, match=r"hvd.add_process_set\(\[0\]\)"):
        rig.session.train("hvd.shutdown()\nhvd.init()", ranks=(0,))


def test_a_rank_that_never_calls_init_is_named(rig: Rig) -> None:
    rig.session.execute("import os; os.environ['HOROVOD_STALL_SHUTDOWN_TIME_SECONDS'] = '1'")
    rig.session.execute("hvd.shutdown()")
    try:
        with pytest.raises(RankError, match=r"hvd.init\(\): no sign of rank 1 for 1 s"):
            rig.session.execute("hvd.init()", ranks=(0,))
        rig.session.execute("hvd.init()")
        assert rig.common("hvd.size()") == 2
    finally:
        rig.session.execute("del os.environ['HOROVOD_STALL_SHUTDOWN_TIME_SECONDS']")
