"""Training with compressed gradients: how far it gets, what is sent, what stays equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

SPECS = ["fp16", "bf16", "int8", "int4", "sign", "topk:0.05", "powersgd:4"]

CELL = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
used_by_one, used_by_none = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD(
    [*model.parameters(), used_by_one, used_by_none], lr=0.05, momentum=0.9
)
for epoch in range(4):
    for xb, yb in loader:
        loss = cross_entropy(model(xb), yb)
        if rank == 1:
            loss = loss + 1e-3 * used_by_one.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@pytest.mark.parametrize("spec", ["none", *SPECS])
def test_ranks_stay_equal_and_the_loss_falls(rig2: Rig, spec: str) -> None:
    run = rig2.session.train(CELL, recipe=Recipe(batch="global", compress=spec))
    loss = run.history["loss"]
    assert loss[-10:].mean() < 0.35 * loss[:3].mean()
    rig2.assert_same_weights("model")
    rig2.common("[float(b.double().sum()) for b in model.buffers()]")
    assert rig2.common("used_by_none.grad is None and used_by_none.tolist() == [1.0] * 3")
    used = rig2.common("used_by_one.tolist()")
    assert used != [1.0] * 3 or spec == "topk:0.05"
    sent, raw = run.history["sent_bytes"], run.history["raw_bytes"]
    num = 64 * 64 + 64 + 2 * 64 + 64 * 10 + 10 + 6  # of numbers in gradients
    least_ratio = {"none": 1, "fp16": 1.8, "bf16": 1.8, "int8": 2, "int4": 3}.get(spec, 1.5)
    assert np.all(raw >= 4 * num)
    assert np.all(sent[-20:] * least_ratio <= raw[-20:])


def test_the_sums_of_one_collective_are_counted(rig2: Rig) -> None:
    """Two ranks, fp32: each sends each number once, and a flag for each parameter."""
    cell = """
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(3):
    optimizer.zero_grad()
    cross_entropy(model(X[:64]), y[:64]).backward()
    optimizer.step()
"""
    run = rig2.session.train(cell)
    assert run.history["sent_bytes"].tolist() == [4.0 * (650 + 2)] * 3
    run = rig2.session.train(cell, recipe=Recipe(compress="fp16"))
    assert run.history["sent_bytes"].tolist() == [2.0 * (650 + 2)] * 3
    assert run.history["raw_bytes"].tolist() == [4.0 * (650 + 2)] * 3


DDP = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64)
model = nn.Sequential(nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 400), nn.ReLU(),
                      nn.Linear(400, 10))
model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for epoch in range(2):
    for i, (xb, yb) in enumerate(loader):
        if i < 28 and i % world_size == rank:
            optimizer.zero_grad()
            cross_entropy(model(xb), yb).backward()
            optimizer.step()
"""


@pytest.mark.parametrize("spec", SPECS)
def test_a_cell_with_ddp_is_compressed_too(rig2: Rig, spec: str) -> None:
    run = rig2.session.train(DDP, recipe=Recipe(compress=spec))
    loss = run.history["loss"]
    assert loss[-5:].mean() < 0.8 * loss[:3].mean()
    rig2.assert_same_weights("model")
    num = 64 * 800 + 800 + 800 * 400 + 400 + 400 * 10 + 10
    assert run.history["raw_bytes"].tolist() == [4.0 * num] * 28
    assert np.all(run.history["sent_bytes"] < 2.1 * num)


def test_what_ddp_sends_by_itself_is_not_known(rig2: Rig) -> None:
    run = rig2.session.train(DDP)
    assert np.isnan(run.history["sent_bytes"]).all()


RESUMED = """
import dtkit
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
WRAP
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
start = dtkit.resume(model=model, optimizer=optimizer)
for epoch in range(start.epoch, 2):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
"""
WRAP = "model = nn.parallel.DistributedDataParallel(model)"


@pytest.mark.parametrize(
    ("spec", "wrap", "amp"),
    [
        *((spec, "", "off") for spec in SPECS[2:]),
        ("int8", "", "fp16"),
        ("topk:0.05", WRAP, "off"),
        ("powersgd:4", WRAP, "off"),
    ],
)
def test_what_is_left_out_goes_into_checkpoints(rig2: Rig, spec: str, wrap: str, amp: str) -> None:
    """Residuals, momentum, bases, the warm-up and the loss scale: a resumed run is the same run."""
    cell, recipe = RESUMED.replace("WRAP", wrap), Recipe(compress=spec, amp=amp)
    options = RunOptions(checkpoint_every=9, checkpoint_keep=100)
    whole = rig2.session.train(cell, recipe=recipe, options=options)
    checkpoint = whole.dir / "checkpoints" / "step-00000009"
    rest = rig2.session.train(cell, recipe=recipe, options=RunOptions(resume=str(checkpoint)))
    for column in ("loss", "sent_bytes"):
        expected = whole.history[column][9:]
        np.testing.assert_array_equal(rest.history[column], expected)
        assert len(expected) > 9
    rig2.assert_same_weights("model")


UNFROZEN = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for i in range(220):
    if i == 210:
        model[0].requires_grad_(True)
    optimizer.zero_grad()
    cross_entropy(model(X[rank::2]), y[rank::2]).backward()
    optimizer.step()
"""


def test_top_k_does_not_warm_up_again_when_a_layer_is_unfrozen(rig2: Rig) -> None:
    run = rig2.session.train(UNFROZEN, recipe=Recipe(compress="topk:0.01"))
    sent = run.history["sent_bytes"]
    assert sent[0] > 10 * sent[209]
    num = 64 * 256 + 256 + 256 * 10 + 10
    assert sent[215] < 0.02 * 4 * num + 100
    rig2.assert_same_weights("model")


FAILS_ONCE = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for i in range(12):
    if i == 8:
        handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
        try:
            cross_entropy(model(X[rank::2]), y[rank::2]).backward()
        except ZeroDivisionError:
            handle.remove()
    optimizer.zero_grad()
    cross_entropy(model(X[rank::2]), y[rank::2]).backward()
    optimizer.step()
"""


@pytest.mark.parametrize("spec", SPECS[2:])
def test_a_pass_that_failed_leaves_what_is_remembered(rig2: Rig, spec: str) -> None:
    """Its buckets are laid out anew."""
    runs = [
        rig2.session.train(cell, recipe=Recipe(compress=spec))
        for cell in (FAILS_ONCE, FAILS_ONCE.replace("i == 8", "False"))
    ]
    losses = [run.history["loss"][-3:] for run in runs]
    np.testing.assert_array_equal(*losses)


LIVES_ON = """
for i in range(6):
    optimizer.zero_grad()
    cross_entropy(model(X[rank::2]), y[rank::2]).backward()
    optimizer.step()
"""


def test_a_ddp_model_of_an_earlier_cell_follows_each_run(rig2: Rig) -> None:
    rig2.session.execute(
        "model = nn.parallel.DistributedDataParallel(nn.Linear(64, 10));"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)"
    )
    num = 64 * 10 + 10
    for spec, num_bytes in (("fp16", 2.0 * num), ("none", None), ("bf16", 2.0 * num)):
        run = rig2.session.train(LIVES_ON, recipe=Recipe(compress=spec))
        sent = run.history["sent_bytes"]
        assert np.isnan(sent).all() if num_bytes is None else sent.tolist() == [num_bytes] * 6
        rig2.assert_same_weights("model")
    rig2.session.execute(LIVES_ON)  # outside of a run: as DDP does
    rig2.assert_same_weights("model")
    rig2.session.execute("import pickle; pickle.loads(pickle.dumps(model))")


def test_a_hook_of_the_cells_own_stays(rig2: Rig) -> None:
    rig2.session.execute("""
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
model = nn.parallel.DistributedDataParallel(nn.Linear(64, 10))
model.register_comm_hook(None, fp16_compress_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
""")
    run = rig2.session.train(LIVES_ON, recipe=Recipe(compress="int8"))
    assert any("communication hook of its own" in note for note in run.notes)
    assert np.isnan(run.history["sent_bytes"]).all()


SPARSE = """
torch.manual_seed(0)
table, out = nn.Embedding(17 * 64, 10, sparse=True), nn.Linear(10, 10)
optimizer = torch.optim.SGD([*table.parameters(), *out.parameters()], lr=0.5, momentum=0.9)
codes = X.round().long().clamp(0, 16) + 17 * torch.arange(64)
for i in range(20):
    loss = cross_entropy(out(table(codes[rank::2]).mean(1)), y[rank::2])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_sparse_gradients_keep_their_momentum(rig2: Rig) -> None:
    """They travel uncompressed; and all of a gradient, by topk, is the gradient."""
    plain = rig2.session.train(SPARSE).history["loss"]
    compressed = rig2.session.train(SPARSE, recipe=Recipe(compress="topk:1.0")).history["loss"]
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(compressed, plain, rtol=1e-4)
