"""The live control of the learning rate: a factor that is there only while an optimizer steps.

So the cell's own schedule never sees it: what it reads and writes between two steps is its own,
and so is what a checkpoint keeps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LrFactor"]


class LrFactor:
    """Multiplies the learning rates of an optimizer's groups for the length of its step.

    Attributes:
        value: the factor; 1: nothing is touched.
    """

    def __init__(self) -> None:
        self.value: float = 1.0
        self._written: list[tuple[dict[str, Any], Any]] = []  # a group, and its own learning rate

    def apply(self, optimizer: Optimizer) -> None:
        """Put the factor in."""
        self.restore()  # a step that raised has left it there
        if self.value == 1.0:
            return
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if isinstance(lr, torch.Tensor):
                # In place: a captured graph reads this very tensor.
                self._written.append((group, lr.detach().clone()))
                lr.detach().mul_(self.value)
            elif isinstance(lr, int | float):
                self._written.append((group, lr))
                group["lr"] = lr * self.value

    def restore(self) -> None:
        """Put the cell's own learning rates back."""
        for group, lr in self._written:
            if isinstance(lr, torch.Tensor):
                group["lr"].detach().copy_(lr)
            else:
                group["lr"] = lr
        self._written.clear()

    def used_by(self, optimizer: Optimizer) -> float:
        """Return what the first group's last step was made with; NaN if it has none."""
        return self.value * own_lr(optimizer)

    def aim(self, optimizer: Optimizer, lr: float) -> bool:
        """Choose the factor that makes it the first group's; return whether there is one."""
        own = own_lr(optimizer)
        if not math.isfinite(own) or own == 0.0:
            return False
        self.value = lr / own
        return True


def own_lr(optimizer: Optimizer) -> float:
    """Return the learning rate of the first group as the cell sets it; NaN if it has none."""
    lr = optimizer.param_groups[0].get("lr")
    return float(lr) if isinstance(lr, int | float | torch.Tensor) else math.nan
