"""An exported script trains as the notebook did."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rig import DIGITS

import dtkit
from dtkit.driver.runs.run import Run
from dtkit.export import Cell, write_script
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

BIN = Path(sys.executable).parent
CELL = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in DataLoader(train_set, batch_size=64, shuffle=True):
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""
HOROVOD = """
import horovod.torch as hvd
from torch.utils.data import Subset
hvd.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters()
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
mine = Subset(train_set, range(hvd.rank(), len(train_set), hvd.size()))  # nobody else divides it
for x, y in DataLoader(mine, batch_size=32):
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""


Case = tuple[tuple[str, ...], Recipe, str, str]
BY_TORCHRUN: Case = (
    ("torchrun", "--nproc-per-node", "2"),
    Recipe(batch="global", compress="fp16"),
    CELL,
    "1 model broadcast, 1 DataLoader sharded",
)
BY_MPIRUN: Case = (
    ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable),
    Recipe(),
    HOROVOD,
    "hvd.DistributedOptimizer combines its gradients",
)


@pytest.mark.parametrize("case", [BY_TORCHRUN, BY_MPIRUN], ids=["torchrun", "mpirun"])
def test_the_losses_are_those_of_the_notebook(
    rig2: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    launcher, recipe, cell, summary = case
    run = rig2.session.train(cell, recipe=recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(dtkit.__file__).parents[1]))
    cells = [Cell(1, f"%%dist\n{DIGITS}"), Cell(2, f"%%dist_train {recipe}\n{cell}")]
    path = write_script("train.py", cells, {2: recipe})
    command = [str(BIN / launcher[0]), *launcher[1:], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    exported = Run.load(tmp_path / "dtkit_runs/train")
    assert exported.state == "finished"
    assert exported.recipe == recipe
    assert re.search(summary, done.stderr)
    assert exported.history.num_steps == run.history.num_steps > 10
    np.testing.assert_allclose(exported.history["loss"], run.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(exported.history["sent_bytes"], run.history["sent_bytes"])
