"""`--accumulate K`: K written steps of an unedited cell make one.

Each written `optimizer.step()` but the K-th is held back: the optimizer's
gradients are put aside, so that its step finds none and does nothing, and the
cell's own zeroing has nothing to destroy. At the K-th they come back as the mean
over all samples of the group, are averaged over the ranks, clipped if the cell
clips, and used. The last group of an epoch may be smaller: it ends with the
DataLoader, at the step after the last batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from dtkit.engine.models import parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

__all__ = ["Accumulation"]


class _Group:
    """The written steps of one optimizer since its last real one."""

    def __init__(self) -> None:
        self.num_held = 0
        self.num_written = 0
        """Steps in all."""
        self.is_held = False
        """Whether the last written step was held back."""
        self.kept: dict[int, torch.Tensor] = {}
        """Gradients that were put aside, in the weight of their samples, by parameter."""
        self.weight = 0.0
        self.first_samples = self.last_samples = 0.0
        self.num_samples_before = 0.0
        self.is_folded = False

    def next_ratio(self, num_samples: float) -> float:
        """Return what the step that is written now weighs, the first of the group being 1."""
        # 0: a second step on the same batch, or no DataLoader: it weighs as the last.
        self.last_samples = (num_samples - self.num_samples_before) or self.last_samples or 1.0
        self.num_samples_before = num_samples
        if not self.weight:
            self.first_samples = self.last_samples
        return self.last_samples / self.first_samples


class Accumulation:
    """Decides which written steps are real, and keeps the gradients of those that are not.

    Args:
        num_steps: how many written steps make one: K; 1: every step is real.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._groups: WeakKeyDictionary[Optimizer, _Group] = WeakKeyDictionary()
        self._schedules: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._num_samples = 0.0
        self._is_last_batch = False
        self._is_ending = False
        self.last_was_held: bool = False
        """Whether the last written step, of any optimizer, was held back."""

    @property
    def is_on(self) -> bool:
        """Whether there is anything to accumulate."""
        return self._num_steps > 1

    @property
    def is_empty(self) -> bool:
        """Whether no gradients are kept."""
        return not any(group.num_held for group in self._groups.values())

    def saw_batch(self, num_samples: float, *, is_last: bool) -> None:
        """Note a training batch, and whether its DataLoader has no more."""
        self._num_samples += num_samples
        self._is_last_batch = is_last

    def holds(self, optimizer: Optimizer) -> bool:
        """Return whether the step of this optimizer that comes next is held back."""
        if not self.is_on or self._is_last_batch or self._is_ending:
            return False
        group = self._groups.get(optimizer)
        return (0 if group is None else group.num_held) + 1 < self._num_steps

    @torch.no_grad()
    def hold(self, optimizer: Optimizer) -> float:
        """Put the optimizer's gradients aside; return what they weigh, the first being 1."""
        group = self._groups.setdefault(optimizer, _Group())
        ratio = group.next_ratio(self._num_samples)
        group.num_held += 1
        group.num_written += 1
        group.weight += ratio
        group.is_held = self.last_was_held = True
        for param in parameters_of(optimizer):
            grad, param.grad = param.grad, None
            if grad is None:
                continue
            kept = group.kept.get(id(param))
            # The first of a group weighs 1: it is kept as it is, without a copy.
            if kept is None:
                group.kept[id(param)] = grad if ratio == 1.0 else grad * ratio
            else:
                group.kept[id(param)] = kept.add_(grad, alpha=ratio)
        return ratio

    @torch.no_grad()
    def fold(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the whole group: before the first use of them."""
        group = self._groups.get(optimizer)
        if group is None or group.is_folded or not group.num_held:
            return
        group.is_folded = True
        ratio = 0.0 if self._is_ending else group.next_ratio(self._num_samples)
        group.weight += ratio
        for param in parameters_of(optimizer):
            kept = group.kept.pop(id(param), None)
            if param.grad is None:
                if kept is not None:
                    param.grad = kept.div_(group.weight)
                continue
            param.grad.mul_(ratio / group.weight)
            if kept is not None:
                param.grad.add_(kept, alpha=1.0 / group.weight)
        group.kept.clear()

    def close(self, optimizer: Optimizer) -> float:
        """End the group with a real step; return what that weighed, the first being 1."""
        if not self.is_on:  # nothing is ever held: a step should cost next to nothing
            return 1.0
        group = self._groups.setdefault(optimizer, _Group())
        group.num_written += 1
        group.is_held = self.last_was_held = False
        ratio = 1.0
        if group.num_held:
            ratio = group.last_samples / group.first_samples
            group.num_held, group.weight, group.is_folded = 0, 0.0, False
        group.num_samples_before = self._num_samples
        return ratio

    def owners(self, grads: Iterable[torch.Tensor]) -> list[Optimizer]:
        """Return the optimizers of these gradients."""
        wanted = {id(g) for g in grads}
        return [
            optimizer
            for optimizer in self._groups
            if any(id(p.grad) in wanted for p in parameters_of(optimizer) if p.grad is not None)
        ]

    def made(self, optimizer: Optimizer) -> None:
        """Note an optimizer."""
        self._groups.setdefault(optimizer, _Group())

    def holds_schedule(self, scheduler: Any) -> bool:
        """Return whether a learning-rate schedule's step is held back with the optimizer's.

        It is if the cell calls it after each written step. One that is called once
        an epoch counts epochs, which are as long as ever.
        """
        optimizer = getattr(scheduler, "optimizer", None)
        group = None if optimizer is None else self._groups.get(optimizer)
        if not self.is_on or group is None:
            return False
        since = group.num_written - self._schedules.get(scheduler, 0)
        self._schedules[scheduler] = group.num_written
        return since == 1 and group.is_held

    def unfinished(self) -> list[tuple[Optimizer, int]]:
        """Return the optimizers whose last group is incomplete, and its number of steps.

        What they do from now on is real.
        """
        self._is_ending = True
        return [(o, group.num_held) for o, group in self._groups.items() if group.num_held]
