"""Adasum's optimizer: each rank steps by itself, and the changes are combined."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from dtkit.engine.reduce.wire import num_gathered_bytes
from dtkit.horovod.engine import sending
from dtkit.horovod.reduction import Op
from dtkit.horovod.torch.reducing import allreduce_async_

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.horovod.torch.gradients import HowToReduce

__all__ = ["DeltaMixin", "unhooked"]


class DeltaMixin:
    """Lets the optimizer step on this rank's gradients, and combines what that changed."""

    _dtkit_distributed = True
    param_groups: list[dict[str, Any]]

    def prepare(
        self, named: Sequence[tuple[str, torch.Tensor]], how: HowToReduce, passes: int
    ) -> None:
        """Take the parameters, and how their changes travel."""
        self._parameter_names = {param: name for name, param in named}
        self._how = how
        self.backward_passes_per_step: int = passes

    def take_part_in(self, memory: object) -> None:
        """Do nothing: nothing is remembered from step to step."""

    def synchronize(self) -> None:
        """Do nothing: there is nothing to wait for before the step."""

    def skip_synchronize(self) -> NoReturn:
        """Raise: a step and its combination are one."""
        msg = "skip_synchronize() has no meaning with op=hvd.Adasum"
        raise AssertionError(msg)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Set how many backward passes make a step; it is the caller who steps."""
        self.backward_passes_per_step = passes

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, and combine the changes of all ranks by Adasum."""
        how = self._how
        if not how.process_set.included():
            return unhooked(super().step)(closure)  # type: ignore[misc]
        before = [p.detach().clone() for p in self._parameter_names]
        result = unhooked(super().step)(closure)  # type: ignore[misc]
        pending, num_ranks = [], how.process_set.size() or 1
        for (param, name), start in zip(self._parameter_names.items(), before, strict=True):
            change = param.detach() - start
            packed, ctx = how.compression.compress(change)
            sending(*(num_gathered_bytes(t.nbytes, num_ranks) for t in (packed, change)))
            handle = allreduce_async_(
                packed, name=f"delta.{name}", op=Op.ADASUM, process_set=how.process_set
            )
            pending.append((param, start, ctx, handle))
        for param, start, ctx, handle in pending:
            change = how.compression.decompress(handle.wait(), ctx)
            param.detach().copy_(start + change)
        return result


def unhooked(step: Any) -> Callable[..., Any]:  # Any: a bound method
    """Return an optimizer's step without the hooks that have run around the whole one already."""
    is_hooked = getattr(step.__func__, "hooked", False)  # torch's mark
    return MethodType(step.__func__.__wrapped__, step.__self__) if is_hooked else step
