"""What dtkit did to a plain cell, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtkit.engine.adoption import Adoption
    from dtkit.engine.loader import ShardedLoaders
    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.reduce import Wire

__all__ = ["what_was_done"]


def what_was_done(
    adoption: Adoption,
    loaders: ShardedLoaders,
    wire: Wire,
    *,
    layout: Layout | None,
    has_passes: bool,
    has_noted_whole: bool,
) -> str:
    """Return the line; empty if nothing was done.

    Args:
        adoption: the optimizers.
        loaders: the DataLoaders that were divided.
        wire: the ranks, and the strategy.
        layout: of a model that several ranks hold together.
        has_passes: whether there was a backward pass.
        has_noted_whole: whether it was said that a loader was not divided.
    """
    parts = []
    if adoption.num_models:
        parts.append(f"{_count(adoption.num_models, 'model')} broadcast")
    batch_sizes = loaders.batch_sizes
    for size in sorted(set(batch_sizes)):
        num = batch_sizes.count(size)
        shares = (
            f" (in batches of {size}, each to the rank that asks first)"
            if wire.strategy.is_free
            else _batch_text(size, loaders)
        )
        parts.append(f"{_count(num, 'DataLoader')} sharded{shares}")
    if layout is not None and layout.averages:
        parts.append("gradients averaged by torch")
    elif adoption.num_averaged:
        parts.append(wire.strategy.does)
    if adoption.num_averaged or layout is not None:
        if not batch_sizes and not has_noted_whole:
            parts.append(
                "no DataLoader was sharded: every rank trains on the data that it reads itself"
            )
    elif has_passes and not adoption.num_left_alone:
        parts.append("no optimizer of torch.optim was used: every rank trains by itself")
    return ", ".join(parts)


def _batch_text(size: int, loaders: ShardedLoaders) -> str:
    num, noun = loaders.num_parts, "ranks" if loaders.num_parts == loaders.num_ranks else "replicas"
    if not size:  # a sampler of batches that does not say
        return ""
    if not loaders.is_global:
        return f" (global batch {num} × {size} = {num * size})"
    if size % num:
        return f" (global batch {size} over {num} {noun})"
    return f" (global batch {size} = {num} × {size // num})"


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"
