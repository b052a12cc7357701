"""What `hvd.DistributedOptimizer` sends compressed: it trains, is remembered, and is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig


@pytest.mark.parametrize(
    "compression", ["int8", "int4", "sign", "topk(0.2)", "powersgd(2)", "fp16", "bf16"]
)
def test_dtkits_compressors_serve_horovods_optimizer(rig2: Rig, compression: str) -> None:
    """As the plain cell's they remember what they leave out; what no rank uses stays."""
    rig2.session.execute(f"""
import horovod.torch as hvd
hvd.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
unused = nn.Parameter(torch.ones(3))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD([*model.parameters(), unused], lr=0.05, momentum=0.9),
    compression=hvd.Compression.{compression},
)
losses, (inputs, targets) = [], train_set.tensors
for epoch in range(3):
    for begin in range(0, 1792, 64):
        part = slice(begin + rank, begin + 64, 2)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs[part]), targets[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
fell = sum(losses[-5:]) / sum(losses[:5])
""")
    assert max(rig2.values("fell")) < 0.4
    rig2.assert_same_weights("model")
    assert rig2.common("unused.tolist()") == [1.0, 1.0, 1.0]


def test_a_compression_that_remembers_needs_an_optimizer(rig2: Rig) -> None:
    with pytest.raises(RankError, match=r"give it to hvd.DistributedOptimizer"):
        rig2.session.execute("hvd.allreduce(torch.ones(3), compression=hvd.Compression.int8)")


RESUMED = """
import dtkit, horovod.torch as hvd
hvd.init()
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=128, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    compression=hvd.Compression.METHOD,
)
start = dtkit.resume(model=model, optimizer=optimizer)
for epoch in range(start.epoch, 2):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb[rank::2]), yb[rank::2]).backward()
        optimizer.step()
"""


@pytest.mark.parametrize("compression", ["int8", "topk(0.05)", "powersgd(4)"])
def test_what_compression_leaves_out_goes_into_checkpoints(rig2: Rig, compression: str) -> None:
    """A resumed run is the same run; and the bytes of its steps are known."""
    cell = RESUMED.replace("METHOD", compression)
    options = RunOptions(checkpoint_every=9, checkpoint_keep=100)
    whole = rig2.session.train(cell, options=options)
    checkpoint = whole.dir / "checkpoints" / "step-00000009"
    rest = rig2.session.train(cell, options=RunOptions(resume=str(checkpoint)))
    for column in ("loss", "sent_bytes"):
        expected = whole.history[column][9:]
        np.testing.assert_array_equal(rest.history[column], expected)
        assert len(expected) > 9
    num = 64 * 64 + 64 + 64 * 10 + 10
    assert set(whole.history["raw_bytes"]) == {4.0 * num}
    assert np.all(whole.history["sent_bytes"] < 2.1 * num)


def test_a_step_is_unscaled_once(rig2: Rig) -> None:
    """The user's class has a step with hooks of its own, within the distributed one."""
    cell = RESUMED.replace("METHOD", "none")
    plain, scaled = (rig2.session.train(cell, recipe=Recipe(amp=a)) for a in ("bf16", "fp16"))
    assert scaled.history.num_steps == plain.history.num_steps
    np.testing.assert_allclose(scaled.history["loss"], plain.history["loss"], rtol=0.1)


def test_what_horovods_own_compression_sends_is_counted(rig2: Rig) -> None:
    num = 64 * 64 + 64 + 64 * 10 + 10
    for compression, num_bytes in (("none", 4.0), ("fp16", 2.0), ("none, op=hvd.Adasum", 4.0)):
        run = rig2.session.train(
            RESUMED.replace("METHOD", compression), options=RunOptions(max_steps=3)
        )
        assert set(run.history["sent_bytes"]) == {num_bytes * num}
        assert set(run.history["raw_bytes"]) == {4.0 * num}
