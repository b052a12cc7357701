"""What a run says that it sends is what leaves the host's network interface."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

import dtkit
from testbed.network import HEADER_BYTES, Network, why_no_network

if TYPE_CHECKING:
    from pathlib import Path

SPECS = ["none", "fp16", "bf16", "int8", "int4", "sign", "topk:0.05", "powersgd:4"]
NUM_STEPS = 12
FRAMES_BYTES = 2500
"""A step's, at most: what gloo puts before each of its messages."""
SEGMENT_BYTES = 1460
"""At most, of what TCP sends again: on a busy machine it takes late for lost."""
SCRIPT = """
import json, sys
import dtkit.script
rank, local_rank, world_size, device, dist = dtkit.script.join()
import torch
from torch import nn

def sent():
    \"\"\"Bytes and packets that left this host, as its interface counted, and TCP's repeats.\"\"\"
    line = next(line for line in open("/proc/self/net/dev") if line.strip().startswith("eth0"))
    numbers = line.split(":")[1].split()
    tcp = [line.split() for line in open("/proc/self/net/snmp") if line.startswith("Tcp:")]
    return int(numbers[8]), int(numbers[9]), int(tcp[1][tcp[0].index("RetransSegs")])

for spec in sys.argv[1:]:
    training = dtkit.script.begin(compress=spec)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randn(16, 256)).square().mean().backward()
        optimizer.step()
        if step == 1:  # by now weights are broadcast and connections open
            dist.barrier()
            before = sent()
    dist.barrier()
    after = sent()
    training.end()
    print("counted", json.dumps([spec, *(now - then for now, then in zip(after, before))]))
dist.barrier()
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    reason = why_no_network()
    if reason:
        pytest.skip(reason)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("num_hosts", [pytest.param(2, marks=pytest.mark.long), 3])
def test_bytes_are_those_of_the_interface(
    environment: dict[str, str], tmp_path: Path, num_hosts: int
) -> None:
    """From 20 kB to 900 kB a step; a third host tells what goes round from what is gathered."""
    (tmp_path / "train.py").write_text(SCRIPT)
    with Network(num_hosts) as network:
        command = [sys.executable, "train.py", *SPECS]
        outputs = network.run(command, tmp_path, environment, timeout_s=250)
    runs = {run.recipe.compress: run for run in dtkit.runs(tmp_path / "dtkit_runs").values()}
    assert set(runs) == set(SPECS)
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("counted")]
        for spec, num_bytes, num_packets, num_repeats in (json.loads(line[8:]) for line in lines):
            history = runs[spec].history
            said = history["sent_bytes"][2:].sum()
            carried = num_bytes - HEADER_BYTES * num_packets
            assert len(history["sent_bytes"]) == NUM_STEPS
            beside = FRAMES_BYTES * (NUM_STEPS - 2) + SEGMENT_BYTES * num_repeats
            assert said <= carried <= said + beside, spec
