"""Where a row of layers is cut into stages: by the time that each takes, or by its parameters."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING

import torch

from dtkit.engine import randomness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["cut", "measured_s", "sizes"]

_ROUNDS = 3


def cut(costs: Sequence[float], has_params: Sequence[bool], num_stages: int) -> list[range]:
    """Return the layers of each stage, such that the most expensive stage costs least.

    Args:
        costs: of the layers, in order.
        has_params: whether a layer has parameters; as many have as there are stages, or more.
        num_stages: how many; each gets parameters, or its rank's optimizer would have none.
    """
    # best[k][i]: the least cost of the worst of k stages that have the first i layers.
    num = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    counts = [sum(has_params[:i]) for i in range(num + 1)]
    best = [[float("inf")] * (num + 1) for _ in range(num_stages + 1)]
    start = [[0] * (num + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for i in range(k, num + 1):
            for j in range(k - 1, i):
                worst = max(best[k - 1][j], sums[i] - sums[j])
                if worst < best[k][i] and counts[i] > counts[j]:
                    best[k][i], start[k][i] = worst, j
    stages: list[range] = []
    stop = num
    for k in range(num_stages, 0, -1):
        stages.insert(0, range(start[k][stop], stop))
        stop = start[k][stop]
    return stages


def measured_s(layers: Sequence[nn.Module], example: torch.Tensor) -> list[float]:
    """Return the seconds that each layer takes to compute forward and backward.

    Args:
        layers: in order; copies of them compute, one at a time.
        example: a batch for the first layer.
    """
    state = randomness.snapshot()
    found = []
    value = example.detach()
    for layer in layers:
        twin = copy.deepcopy(layer).eval()  # in evaluation nothing in it changes
        times = []
        for _ in range(_ROUNDS):
            given = value.detach()
            if given.is_floating_point():
                given.requires_grad_()
            begun = time.perf_counter()
            with torch.enable_grad():
                output = twin(given)
                if output.requires_grad:
                    # Not `.backward()`: a run would take it for a pass of the cell's.
                    leaves = [t for t in (given, *twin.parameters()) if t.requires_grad]
                    torch.autograd.grad(output.float().sum(), leaves, allow_unused=True)
            if output.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found.append(statistics.median(times))
        value = output
    randomness.restore(state)
    return found


def sizes(layers: Sequence[nn.Module]) -> list[float]:
    """Return the number of parameters of each layer."""
    return [float(sum(p.numel() for p in layer.parameters())) for layer in layers]
