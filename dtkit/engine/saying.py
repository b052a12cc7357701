"""What dtkit did to a plain cell, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.engine.adoption import Adoption
    from dtkit.engine.reduce import Wire

__all__ = ["what_was_done"]


def what_was_done(
    adoption: Adoption,
    batch_sizes: Sequence[int],
    wire: Wire,
    *,
    is_global: bool,
    has_passes: bool,
    has_noted_whole: bool,
) -> str:
    """Return the line; empty if nothing was done.

    Args:
        adoption: the optimizers.
        batch_sizes: as written, of the loaders that were divided.
        wire: the ranks, and the strategy.
        is_global: whether a written batch size is that of all ranks together.
        has_passes: whether there was a backward pass.
        has_noted_whole: whether it was said that a loader was not divided.
    """
    parts = []
    if adoption.num_models:
        parts.append(f"{_count(adoption.num_models, 'model')} broadcast")
    for size in sorted(set(batch_sizes)):
        num = batch_sizes.count(size)
        shares = (
            f" (in batches of {size}, each to the rank that asks first)"
            if wire.strategy.is_free
            else _batch_text(size, wire.group.size(), is_global=is_global)
        )
        parts.append(f"{_count(num, 'DataLoader')} sharded{shares}")
    if adoption.num_averaged:
        parts.append(wire.strategy.does)
        if not batch_sizes and not has_noted_whole:
            parts.append(
                "no DataLoader was sharded: every rank trains on the data that it reads itself"
            )
    elif has_passes and not adoption.num_left_alone:
        parts.append("no optimizer of torch.optim was used: every rank trains by itself")
    return ", ".join(parts)


def _batch_text(size: int, num: int, *, is_global: bool) -> str:
    if not size:  # a sampler of batches that does not say
        return ""
    if not is_global:
        return f" (global batch {num} × {size} = {num * size})"
    if size % num:
        return f" (global batch {size} over {num} ranks)"
    return f" (global batch {size} = {num} × {size // num})"


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"
