"""Loss scaling for float16, whose smallest numbers are larger than many gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LossScale"]

# source: the defaults of torch.amp.GradScaler.
_START = 2.0**16
_GROWTH = 2.0
_BACKOFF = 0.5
_GROWTH_INTERVAL = 2000


class LossScale:
    """A factor for losses, as large as gradients in float16 allow.

    The rule is that of torch's GradScaler, which needs its calls in the cell; here
    the cell has none.
    """

    def __init__(self) -> None:
        self.value: float = _START
        self.num_skipped: int = 0
        self._num_good = 0
        self._are_finite: dict[int, bool] = {}

    @torch.no_grad()
    def unscale(self, key: int, grads: Sequence[torch.Tensor]) -> None:
        """Divide gradients by the scale, and look whether they are finite.

        Args:
            key: whose they are.
            grads: equal on all ranks, and so is what is found.
        """
        values = [grad._values() if grad.is_sparse else grad for grad in grads]  # noqa: SLF001
        if not values:
            self._are_finite[key] = True
            return
        torch._foreach_mul_(values, 1.0 / self.value)
        device = values[0].device
        largest = torch.stack([v.abs().amax().to(device) for v in values if v.numel()])
        self._are_finite[key] = bool(largest.isfinite().all())

    def was_finite(self, key: int) -> bool:
        """Return whether the gradients were; if not, their step counts as skipped."""
        is_finite = self._are_finite[key]
        self.num_skipped += not is_finite
        return is_finite

    def state(self) -> dict[str, Any]:
        """Return the scale, and what the next `update` will take into account."""
        finite = list(self._are_finite.values())
        return {"value": self.value, "num_good": self._num_good, "finite": finite}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave."""
        self.value, self._num_good = state["value"], state["num_good"]
        self._are_finite = dict(enumerate(state["finite"]))

    def update(self) -> None:
        """Take the steps since the last update into account."""
        if not all(self._are_finite.values()):
            self.value *= _BACKOFF
            self._num_good = 0
        else:
            self._num_good += 1
            if self._num_good == _GROWTH_INTERVAL:
                self.value *= _GROWTH
                self._num_good = 0
        self._are_finite.clear()
