"""What was done to a model, in a line for the user."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dtkit.engine.process.agent import current_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from dtkit.engine.parallel.tensor_plan import Choice

__all__ = ["cut_summary", "held_bytes", "mib", "say", "summary", "tensor_summary", "tensor_table"]


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


def tensor_summary(model: nn.Module, choices: Sequence[Choice], num_ranks: int) -> str:
    """Return what became of a model whose layers were divided."""
    params = list(model.parameters())
    num = sum(choice.style != "whole" for choice in choices)
    return (
        f"{type(model).__name__} tensor parallel over {num_ranks} ranks: {num} layers divided, "
        f"{mib(held_bytes(params))} of {mib(sum(p.nbytes for p in params))} MiB of parameters on "
        "each"
    )


def tensor_table(model: nn.Module, choices: Sequence[Choice]) -> str:
    """Return what becomes of each layer; the same layers of several blocks are one line."""
    modules = dict(model.named_modules())
    rows: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices:
        path = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", choice.path) or type(model).__name__
        text = f"{path} ({type(modules[choice.path]).__name__})"
        rows.setdefault((text, choice.style, choice.why), []).append(choice.path)
    lines = [
        (f"{paths[0]}{text[text.index(' '):]}" if len(paths) == 1 and paths[0] else text,
         style, f"{why}{' ' if why else ''}{f'(× {len(paths)})' if len(paths) > 1 else ''}")
        for (text, style, why), paths in rows.items()
    ]  # fmt: skip
    lines = [("layer", "style", "why"), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(
        f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in lines
    )


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how much memory this rank gives to tensors."""
    return sum(
        t.to_local().nbytes if isinstance(t, DTensor) else 0 if t.is_meta else t.nbytes
        for t in tensors
    )


def mib(num_bytes: float) -> str:
    """Return a size in MiB, to three digits."""
    return f"{num_bytes / (1 << 20):.3g}"
