"""A number of the user's, averaged over the ranks."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["mean_over", "sharing_metric"]

# Any, below: the user's own value.


def mean_over(group: dist.ProcessGroup, value: Any, weight: float = 1.0) -> Any:
    """Return a number averaged over the ranks, as the type that it was.

    Args:
        group: the ranks.
        value: this rank's; what is no number comes back as it is.
        weight: what it weighs here.
    """
    if isinstance(value, torch.Tensor):
        total = value.detach() * weight
    elif isinstance(value, bool) or not isinstance(value, Real):
        return value
    else:
        total = torch.tensor(float(value) * weight, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    total = total / dist.get_world_size(group)
    return total if isinstance(value, torch.Tensor) else total.item()


def sharing_metric(
    group: dist.ProcessGroup, is_own: Callable[[], bool], original: Callable[..., None]
) -> Callable[..., None]:
    """Return what takes the place of `ReduceLROnPlateau.step`: its metric is the ranks' mean.

    Args:
        group: the ranks.
        is_own: whether the cell shares its metrics itself.
        original: the method.
    """

    def step(scheduler: Any, metrics: Any, *args: Any, **kwargs: Any) -> None:
        # It decides by the metric, and a metric of the rank's own share of the
        # data would give every rank a learning rate of its own.
        shared = metrics if is_own() else mean_over(group, metrics)
        original(scheduler, shared, *args, **kwargs)

    return step
