"""Gradients that were computed before, handed over when `loss.backward()` asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["deliver"]

# Any, below: torch's context object, and its arguments.


def deliver(loss: torch.Tensor, grads: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the loss, such that its backward pass gives parameters these gradients.

    They are multiplied with the gradient of the loss, as if it were computed then: so it
    may be scaled, weighted and divided as any loss.

    Args:
        loss: its value.
        grads: parameters, and their gradients.
    """
    # The first has no gradient: it lets the loss have a graph where nothing is trained.
    anchor = torch.zeros((), requires_grad=True)
    make: Any = _Deliver.apply
    found: torch.Tensor = make(loss, [grad for _, grad in grads], anchor, *(p for p, _ in grads))
    return found


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, grads: list[torch.Tensor], *_params: Any) -> Any:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        return (None, None, None, *(grad * scale.to(grad.dtype) for grad in ctx.grads))
