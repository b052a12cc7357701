"""One rank of the benchmark of slow links: trains, its link made as slow as it is told.

`python -m benchmarks.link_worker METHOD OUT [--quick]` on each host; METHOD is `ddp` or what
`--compress` takes. Rank 0 writes to OUT, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtkit.script
from dtkit.compression import Compression
from dtkit.engine.reduce.compressors import Layout, make_compressor, rehearse
from testbed.network import limiting

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 16
WIDTHS = (1024, 2048, 2048, 1024)
"""Of a multilayer perceptron with 8.4 million parameters: little to compute, much to send."""
RATES_MBIT_PER_S = (100.0, 1000.0)
WARM_STEPS = 6
LONG_WARM_STEPS = 210
"""`topk` and `sign` send more in their first 200 steps: see `compressors._momentum`."""


def main(method: str, out: Path, *, is_quick: bool) -> None:
    """Train as `method` says, on this rank of several."""
    rank, _, world_size, _, dist = dtkit.script.join()
    torch.manual_seed(0)
    layers = [layer for sizes in pairwise(WIDTHS) for layer in (nn.Linear(*sizes), nn.ReLU())]
    model: nn.Module = nn.Sequential(*layers)
    num_params = sum(p.numel() for p in model.parameters())
    training = None
    if method == "ddp":
        model = DistributedDataParallel(model)
    else:
        training = dtkit.script.begin(compress=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = torch.randn(BATCH, WIDTHS[0])

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    for _ in range(LONG_WARM_STEPS if method.startswith(("topk", "sign")) else WARM_STEPS):
        step()
    times_s = {}
    for rate in RATES_MBIT_PER_S:
        subprocess.run(limiting(rate), check=True)
        dist.barrier()
        step()  # the bucket of the last rate runs empty
        num_steps = 3 if is_quick else (7 if rate < 1000 else 21)
        times_s[f"{rate:g}"] = [_seconds(step) for _ in range(num_steps)]
    subprocess.run(limiting(None), check=True)
    if training is not None:
        training.end()
    dist.barrier()
    if rank == 0:
        facts = {"times_s": times_s, "num_params": num_params, "samples": BATCH * world_size}
        out.write_text(json.dumps(facts | {"cpu_ms_per_mb": _cpu_ms_per_mb(method, world_size)}))


def _seconds(work: Callable[[], None]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def _cpu_ms_per_mb(method: str, world_size: int) -> float:
    """Return the CPU time to compress 1 MB of float32 gradients and to average what ranks sent."""
    layout = Layout((torch.Size([1024, 1024]),), torch.float32, torch.device("cpu"), world_size)
    name = "none" if method == "ddp" else method
    compressor = make_compressor(Compression.parse(name), layout)
    if compressor is None:
        return 0.0
    compressor.load([{"num_passes": LONG_WARM_STEPS}])
    grads, times_s = torch.randn(layout.num_elements), []
    for _ in range(15):
        begun_s = time.process_time()
        rehearse(compressor, grads, torch.empty_like(grads))
        times_s.append(time.process_time() - begun_s)
    return 1000 * sorted(times_s)[len(times_s) // 2] / (4 * layout.num_elements / 1e6)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), is_quick="--quick" in sys.argv)
