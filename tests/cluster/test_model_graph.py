"""The model's graph and the profiles in TensorBoard's files, from real runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.graph_pb2 import GraphDef

from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

    from dtkit.driver.runs.run import Run

CELL = """
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(32).eval()
        self.head = nn.Linear(32, 10)
    def forward(self, x, *, scale=1.0, mask=None):
        return self.head(scale * self.frozen(self.body(x)) * mask)
model = Net()
WRAP
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in DataLoader(train_set, batch_size=128):
    optimizer.zero_grad()
    cross_entropy(model(xb, scale=2.0, mask=torch.ones(32)), yb).backward()
    optimizer.step()
modes = [m.training for m in model.modules()]
"""


def nodes(run: Run) -> set[str]:
    """Return the names of the graph's nodes, as TensorBoard reads them."""
    (path,) = (run.dir / "tensorboard").glob("events.out.tfevents.*")
    (data,) = [
        event.graph_def for event in LegacyEventFileLoader(str(path)).Load() if event.graph_def
    ]
    return {node.name for node in GraphDef.FromString(data).node}


@pytest.mark.parametrize("wrap", ["", "model = nn.parallel.DistributedDataParallel(model)"])
def test_the_graph_is_written_and_changes_nothing(rig2: Rig, wrap: str) -> None:
    cell = CELL.replace("WRAP", wrap)
    plain = rig2.session.train(cell)
    modes = rig2.common("modes")
    run = rig2.session.train(cell, options=RunOptions(tensorboard="", tensorboard_graph=True))
    assert rig2.common("modes") == modes
    assert run.history["loss"].tolist() == plain.history["loss"].tolist()
    names = nodes(run)
    assert any("Linear[head]" in name for name in names), names
    assert any("Dropout" in name for name in names), names


def test_a_model_that_cannot_be_traced_is_a_note(rig2: Rig) -> None:
    cell = CELL.replace("WRAP", "model.body = nn.Sequential(model.body, Refusing())")
    rig2.session.execute(
        "class Refusing(nn.Module):\n"
        "    def forward(self, x):\n"
        "        if torch.jit.is_tracing():\n"
        "            raise TypeError('not this one')\n"
        "        return x\n"
    )
    run = rig2.session.train(cell, options=RunOptions(tensorboard="", tensorboard_graph=True))
    assert "no model graph: TypeError: not this one" in run.notes
    assert run.state == "finished"


def test_profiles_lie_where_the_profiler_tab_looks(rig2: Rig) -> None:
    run = rig2.session.train(
        CELL.replace("WRAP", ""), options=RunOptions(tensorboard="", profile=2)
    )
    for rank in (0, 1):
        trace = json.loads((run.dir / "tensorboard" / f"rank_{rank}.pt.trace.json").read_text())
        assert trace["distributedInfo"]["rank"] == rank
