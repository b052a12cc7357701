"""Use an installed dtkit as a notebook does: one session, and what most cells need.

make smoke runs it in an environment that holds the wheel and what it asks for, without a network.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib.metadata import version

from IPython.core.interactiveshell import InteractiveShell

MODEL = """\
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(160, 8), torch.randn(160, 1))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
"""
PLAIN = "loader = DataLoader(data, batch_size=8, shuffle=True)\n"
DDP = """\
model = nn.parallel.DistributedDataParallel(model)
loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
"""
LOOP = """\
for epoch in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
"""
OPTIMIZER = "optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)\n"
RESUME = "dtkit.resume(model=model, optimizer=optimizer)\n"
CELLS = {
    "a session": "%load_ext dtkit\n%dist_init -n 2 --devices cpu",
    "a collective": "%%dist\nimport torch, dtkit\ndist.all_reduce(torch.ones(1))",
    "a plain cell": "%%dist_train --name plain --checkpoint-every 7\n"
    + MODEL + PLAIN + OPTIMIZER + RESUME + LOOP,
    "its checkpoint": "%%dist_train --resume plain\n" + MODEL + PLAIN + OPTIMIZER + RESUME + LOOP,
    "DDP": "%%dist_train\n" + MODEL + DDP + OPTIMIZER + LOOP,
    "compression": "%%dist_train --compress int8 --amp bf16 --accumulate 2\n"
    + MODEL + PLAIN + OPTIMIZER + LOOP,
    "sharding": "%%dist_train --strategy shard\n" + MODEL + PLAIN + OPTIMIZER + LOOP,
    "a timeline": "%%dist_train --timeline\n" + MODEL + PLAIN + OPTIMIZER + LOOP,
    "the model here": "%dist_pull model\nassert len(list(model.parameters())) == 4",
    "a rank that raises": "%%dist\nif rank == 1:\n    raise ValueError('no')\n"
    "dist.all_reduce(torch.ones(1))",
    "the next cell": "%%dist\ndist.all_reduce(torch.ones(1))",
    "the end": "%dist_shutdown",
}  # fmt: skip
FAILING = "a rank that raises"


def main() -> int:
    """Run the cells; returns how many did not do what they should."""
    names = ("dtkit", "torch", "ipyparallel", "ipykernel", "ipython")
    print(platform.python_version(), *(f"{name} {version(name)}" for name in names))
    shell = InteractiveShell.instance()
    num_wrong = 0
    for name, cell in CELLS.items():
        has_failed = not shell.run_cell(cell).success
        is_right = has_failed is (name == FAILING)
        num_wrong += not is_right
        print(f"── {name}: {'as it should' if is_right else 'WRONG'}", flush=True)
    return num_wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dtkit-smoke-") as folder:
        os.chdir(folder)
        num_wrong = main()
        os.chdir("/")
    sys.exit(num_wrong)
