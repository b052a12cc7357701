"""Losses that are on a device still: kept as tensors, and read by whoever has the time."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["PendingLoss", "read_losses"]


class PendingLoss(NamedTuple):
    """A step's loss that is on a device still, at least in part."""

    read: float
    on_device: list[tuple[torch.Tensor, float]]
    factor: float


def read_losses(losses: list[float | PendingLoss]) -> list[float]:
    """Read the losses that are still on a device, all at once: one synchronisation."""
    tensors = [t for loss in losses if isinstance(loss, PendingLoss) for t, _ in loss.on_device]
    if not tensors:
        return losses  # type: ignore[return-value]  # no PendingLoss among them
    device = tensors[0].device
    values = iter(torch.stack([t.reshape(()).double().to(device) for t in tensors]).tolist())
    return [
        loss.factor * (loss.read + sum(weight * next(values) for _, weight in loss.on_device))
        if isinstance(loss, PendingLoss)
        else loss
        for loss in losses
    ]
