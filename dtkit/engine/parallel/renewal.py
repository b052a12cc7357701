"""Optimizers that were made before their model was laid out go on with its new parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dtkit.engine.living import living

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Renewal"]

# Any, below: an optimizer's state.


class Renewal:
    """Remembers a model's parameters by name, to find what takes their places.

    Args:
        model: as it is before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(model.named_parameters(remove_duplicate=False))

    def renew(self) -> None:
        """Put the new parameters where live optimizers have the old ones, with their state."""
        after = dict(self._model.named_parameters(remove_duplicate=False))
        new = {id(old): after[name] for name, old in self._before.items() if after[name] is not old}
        for optimizer in living(Optimizer):
            for group in optimizer.param_groups:
                for i, old in enumerate(group["params"]):
                    if id(old) in new:
                        group["params"][i] = new[id(old)]
                        state = optimizer.state.pop(old, None)
                        if state is not None:
                            optimizer.state[new[id(old)]] = _alike(state, old, new[id(old)])


@torch.no_grad()
def _alike(state: dict[str, Any], old: torch.Tensor, new: torch.Tensor) -> dict[str, Any]:
    """Return an optimizer's state with the tensors of the parameter's shape laid out as it is."""
    if not isinstance(new, DTensor):
        return state
    return {
        name: distribute_tensor(value, new.device_mesh, new.placements, src_data_rank=None)
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == old.shape
        else value
        for name, value in state.items()
    }
