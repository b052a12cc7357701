"""The models of an optimizer, as far as all ranks have the same."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from dtkit.engine import weights
from dtkit.engine.models import find_models, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    import torch.distributed as dist

__all__ = ["survey", "survey_here"]


def survey(
    params: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
    """Return the models of the parameters, and all that is to be equal on all ranks.

    Both are empty if the ranks have different parameters.
    """
    for is_clean in (False, True):
        if is_clean:
            gc.collect()  # a dead model that holds one of these may live on some ranks only
        models = find_models(params)
        state = state_of(models, params)
        if weights.are_alike(state, group):
            return models, state
    return [], list(params) if weights.are_alike(params, group) else []


def survey_here(
    params: Sequence[torch.Tensor],
) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
    """Return the same of this rank, which asks no other."""
    gc.collect()
    models = find_models(params)
    return models, state_of(models, params)
