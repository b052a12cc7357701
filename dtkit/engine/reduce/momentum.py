"""Momentum that is applied before compression, in place of the optimizer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.optim import SGD, Optimizer

from dtkit.engine.models import averages_itself
from dtkit.engine.reduce.compressors.base import Momentum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

__all__ = ["MomentumCorrection"]

_LEAST_REST = 1e-3


class MomentumCorrection:
    """Lets a compressor apply the momentum of SGD, and keeps the optimizer from doing it again.

    What a compressor holds back reaches the optimizer late, and momentum there
    would act on delayed values. source: Deep Gradient Compression, ICLR 2018, 3.1.
    """

    def __init__(self) -> None:
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._suspended: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()

    def of(self, param: torch.Tensor) -> Callable[[], Momentum]:
        """Return what returns the momentum of a parameter's optimizer."""
        own = ref(param)
        found: list[ref[Optimizer]] = []

        def momentum() -> Momentum:
            optimizer = found[0]() if found else None
            if optimizer is None or optimizer not in self._optimizers:
                optimizer = self._owner(own())
                found[:] = [] if optimizer is None else [ref(optimizer)]
            groups = optimizer.param_groups if optimizer is not None else []
            target = own()
            # The value now: schedules such as OneCycleLR change it.
            for group in groups:
                if any(p is target for p in group["params"]):
                    return Momentum(float(group["momentum"]), bool(group["nesterov"]))
            return Momentum()

        return momentum

    def made(self, optimizer: Optimizer) -> None:
        """Note an optimizer; one that is none of ours keeps its momentum."""
        # A subclass may do with momentum what it likes; Horovod's wrapper does not.
        is_sgd = type(optimizer) is SGD or (
            isinstance(optimizer, SGD) and averages_itself(optimizer)
        )
        # A compressor adds whole gradients up: damped ones would have another length.
        if is_sgd and not any(group["dampening"] for group in optimizer.param_groups):
            self._optimizers.add(optimizer)

    def excuse(self, params: Iterable[torch.Tensor]) -> None:
        """Let the optimizers of parameters that no compressor sees keep their momentum."""
        for param in params:
            owner = self._owner(param)
            if owner is not None:
                self._optimizers.discard(owner)

    def _owner(self, param: torch.Tensor | None) -> Optimizer | None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(p is param for p in group["params"]):
                    return optimizer
        return None

    def suspend(self, optimizer: Optimizer) -> None:
        """Take the momentum out of the step that begins."""
        if optimizer not in self._optimizers or optimizer in self._suspended:
            return
        self._suspended[optimizer] = [
            {name: group[name] for name in ("momentum", "nesterov", "dampening", "weight_decay")}
            for group in optimizer.param_groups
        ]
        for group in optimizer.param_groups:
            # Weight decay goes through momentum too, which multiplies it by this in the long run.
            group["weight_decay"] /= max(1 - group["momentum"], _LEAST_REST)
            group.update(momentum=0.0, nesterov=False, dampening=0.0)

    def resume(self, optimizer: Optimizer) -> None:
        """Put the momentum back after the step."""
        for group, values in zip(
            optimizer.param_groups, self._suspended.pop(optimizer, ()), strict=False
        ):
            group.update(values)

    def close(self) -> None:
        """Put back what a step that raised has left."""
        for optimizer in list(self._suspended):
            self.resume(optimizer)
