"""What a run leaves behind, looked at: history, TensorBoard, timeline."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np

import dtkit

if TYPE_CHECKING:
    from conftest import Rig

CELL = """
import dtkit
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in loader:
    optimizer.zero_grad()
    loss = cross_entropy(model(xb), yb)
    loss.backward()
    optimizer.step()
    dtkit.log(doubled=2.0)
"""


def test_a_run_is_read_back_in_another_process(rig2: Rig) -> None:
    run = rig2.session.train(CELL, name="kept")
    assert dtkit.runs()["kept"] is run
    code = (
        "import dtkit, numpy, sys\n"
        "run = dtkit.runs(sys.argv[1])['kept']\n"
        "assert run.state == 'finished' and run.environment['world_size'] == 2\n"
        "assert any('averaged' in note for note in run.notes)\n"
        "numpy.save(sys.argv[2], run.history['loss'])\n"
        "assert '<img' in run._repr_mimebundle_()['text/html']\n"
        "assert 'torch' not in sys.modules\n"
    )
    out = run.dir / "loss.npy"
    subprocess.run([sys.executable, "-c", code, str(run.dir.parent), str(out)], check=True)
    np.testing.assert_array_equal(np.load(out), run.history["loss"])
