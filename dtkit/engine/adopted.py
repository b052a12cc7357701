"""What is known of an optimizer that a run has taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.reduce import GradSynchronizer

__all__ = ["Adopted"]


class Adopted:
    """What is known of one optimizer; the optimizer itself is not kept alive."""

    def __init__(self) -> None:
        self.models: list[torch.nn.Module] = []
        self.synchronizers: list[GradSynchronizer] = []
        self.num_params = 0
        self.frozen: list[torch.Tensor] = []
        self.is_left_alone = False
        self.num_taken = 0
        self.layout: Layout | None = None

    def is_outdated(self, optimizer: Optimizer) -> bool:
        """Return whether the cell added parameters since, or unfroze some."""
        num_params = sum(len(group["params"]) for group in optimizer.param_groups)
        return num_params != self.num_params or any(p.requires_grad for p in self.frozen)
