"""The norm of the gradients that a step uses, as a metric of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.parts import Part

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]


class GradNorm(Part):
    """Logs `grad_norm`: of all gradients of a step together, final and not scaled.

    Every rank does it, so that none is slower than the others.
    """

    def __init__(self, run: ActiveRun) -> None:
        self._recorder = run.recorder
        self._norms: list[torch.Tensor] = []

    def before_step(self, optimizer: Optimizer) -> None:
        """Take the norm; its value is read later, so that no device is waited for."""
        grads = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and not p.grad.is_sparse
        ]
        if not grads:
            return
        with torch.no_grad():
            device = grads[0].device
            norms = [norm.to(device) for norm in torch._foreach_norm(grads)]  # noqa: SLF001  torch's own clipping uses it
            norm = torch.linalg.vector_norm(torch.stack(norms))
            # A fused optimizer divides by the GradScaler's scale itself.
            scale = getattr(optimizer, "grad_scale", None)
            self._norms.append(norm if scale is None else norm / scale.to(device))

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Log it under the step that used them."""
        norms, self._norms = self._norms, []
        if norms:
            self._recorder.log({"grad_norm": torch.linalg.vector_norm(torch.stack(norms))})


def make(run: ActiveRun) -> Part:
    """Return the part for a run."""
    return GradNorm(run)
