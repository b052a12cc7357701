"""What was done to a model, in a line for the user."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dtkit.engine.parallel.layout import current_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["held_bytes", "mib", "say", "summary"]


def say(group: dist.ProcessGroup, text: str) -> None:
    """Tell the user, once: as a note of the run, or in the cell's output."""
    if dist.get_rank(group):
        return
    run = current_run()
    if run is not None:
        run.note(text)
    else:
        print(text)  # noqa: T201  the cell's own output


def summary(model: nn.Module, names: Sequence[str], mesh: DeviceMesh) -> str:
    """Return what became of a model that was sharded; `names` are its units' classes."""
    num_shards = mesh.size(mesh.ndim - 1)
    num_copies = mesh.size() // num_shards
    inner = [f"{n} {kind}" for kind, n in Counter(names[:-1]).items()]
    params = list(model.parameters())
    copies = f", {num_copies} copies" if num_copies > 1 else ""
    return (
        f"{names[-1]} sharded over {num_shards} ranks{copies}: "
        f"{mib(held_bytes(params))} of {mib(sum(p.nbytes for p in params))} MiB of parameters "
        f"on each, gathered in {len(names)} units ({', '.join([*inner, 'the rest'])})"
    )


def cut_summary(
    layers: Sequence[nn.Module], ranges: Sequence[range], costs: Sequence[float], num_ranks: int,
    *, is_measured: bool,
) -> str:  # fmt: skip
    """Return how layers were cut into stages, and what each rank holds."""
    unit = "of the time" if is_measured else "of the parameters"
    texts = []
    for number, layers_of in enumerate(ranges):
        size = sum(p.nbytes for i in layers_of for p in layers[i].parameters())
        share = sum(costs[i] for i in layers_of) / (sum(costs) or 1.0)
        last = layers_of[-1]
        which = f"layer {last}" if len(layers_of) == 1 else f"layers {layers_of[0]} to {last}"
        rank = number % num_ranks
        texts.append(f"rank {rank}: {which}, {mib(size)} MiB, {share:.0%} {unit}")
    return f"pipeline of {len(ranges)} stages ({'; '.join(texts)})"


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how much memory this rank gives to tensors."""
    return sum(
        t.to_local().nbytes if isinstance(t, DTensor) else 0 if t.is_meta else t.nbytes
        for t in tensors
    )


def mib(num_bytes: float) -> str:
    """Return a size in MiB, to three digits."""
    return f"{num_bytes / (1 << 20):.3g}"
