"""The layers of a pipeline that are on this rank, and those that are not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtkit.engine import weights
from dtkit.engine.models import state_of
from dtkit.engine.parallel.materialize import materialize
from dtkit.engine.parallel.pieces import PIECE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist

__all__ = ["Stage", "keep_only"]


class Stage:
    """A stage of this rank.

    It computes with a twin of the layers, whose parameters share the memory of theirs. So
    what a schedule adds up does not touch `.grad` of the parameters that an optimizer knows,
    and their hooks run when the cell calls `backward()`.

    Args:
        layers: of the stage.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        # A list, and no module: it would be taken for another model with these parameters.
        self._layers = list(layers)
        memo: dict[int, Any] = {id(b): b for layer in layers for b in layer.buffers()}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for param in {p: None for layer in layers for p in layer.parameters()}:
            alias = nn.Parameter(param.detach(), requires_grad=param.requires_grad)
            memo[id(param)] = alias
            self._pairs.append((param, alias))
        self.twin: nn.Sequential = nn.Sequential(*copy.deepcopy(self._layers, memo))

    def begin(self) -> None:
        """Make ready for a step."""
        for param, alias in self._pairs:
            alias.grad = None
            alias.requires_grad_(param.requires_grad)
        for layer, twin in zip(self._layers, self.twin, strict=True):
            for module, copied in zip(layer.modules(), twin.modules(), strict=True):
                copied.training = module.training

    def grads(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Return the gradients of a step, and whose they are."""
        return [(param, alias.grad) for param, alias in self._pairs if alias.grad is not None]


def keep_only(
    layers: Sequence[nn.Module], mine: set[int], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Give all ranks the first one's weights, and let go of those that are not this rank's.

    Args:
        layers: all of them. Those that were made on the meta device get their weights here.
        mine: numbers of those that stay.
        group: the ranks.
        device: where they stay.
    """
    for number, layer in enumerate(layers):
        materialize(layer, device)
        weights.broadcast(state_of([layer], []), group)
        if number not in mine:
            _let_go(layer)
        for tensor in state_of([layer], []):
            setattr(tensor, PIECE, True)


def _let_go(layer: nn.Module) -> None:
    for module in layer.modules():
        both: list[dict[str, Any]] = [module._parameters, module._buffers]  # noqa: SLF001  replaced in place
        for held in both:
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = _gone(tensor)


def _gone(tensor: torch.Tensor) -> torch.Tensor:
    gone = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(gone, requires_grad=tensor.requires_grad)
    return gone
