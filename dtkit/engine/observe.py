"""Hooks into torch for the length of a run: the cell's code stays as it is.

What happens in training is told to a `Sink`; this module knows only where in
torch it can be seen. Patched functions keep their signature and result.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim import optimizer as optim
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dtkit.engine.outermost import Outermost, found_inf
from dtkit.engine.parallel.norms import own_parts
from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Sink", "observing", "unseen"]

_HIDDEN: list[str] = []
"""Packages that torch's compiler was told to leave alone, which lasts for the process."""

# Any, throughout: the patched functions pass on arguments that are not ours.


class Sink(Protocol):
    """What wants to know; called on the training thread, in program order."""

    def before_backward(self, losses: Sequence[Any], grads: Sequence[Any] | None) -> float:
        """A backward pass begins, from losses with these gradients; returns its weight."""

    def after_backward(self, *, has_failed: bool) -> None:
        """The backward pass has ended."""

    def optimizer_made(self, optimizer: optim.Optimizer) -> None:
        """The cell made an optimizer."""

    def before_step(self, optimizer: optim.Optimizer, closure: Any) -> Any:
        """A step begins; returns the closure to use."""

    def after_step(self, optimizer: optim.Optimizer) -> None:
        """A step has been done."""

    def step_skipped(self, optimizer: optim.Optimizer) -> None:
        """The GradScaler found non-finite gradients and made no step."""

    def before_unscaling(self, optimizer: optim.Optimizer) -> None:
        """An optimizer's gradients are about to be unscaled."""

    def before_clipping(self, grads: Sequence[torch.Tensor]) -> bool:
        """Gradients are about to be clipped, or their norm to be taken; returns whether to clip."""

    def norm_of(self, grads: Sequence[torch.Tensor], order: float) -> torch.Tensor | None:
        """The norm of gradients that several ranks hold together; None: these are whole."""

    def holds(self, optimizer: optim.Optimizer) -> bool:
        """Whether an optimizer's next step is to be held back."""

    def hold(self, optimizer: optim.Optimizer) -> None:
        """Hold a step back that a GradScaler was to make."""

    def holds_update(self) -> bool:
        """Whether a GradScaler has nothing to learn from, the step having been held back."""

    def holds_schedule(self, scheduler: LRScheduler) -> bool:
        """Whether a learning rate is to stay, the optimizer's step having been held back."""

    def iterate(self, loader: DataLoader[Any], original: Callable[..., Any]) -> Iterator[Any]:
        """A DataLoader is being iterated over."""

    def num_batches(self, loader: DataLoader[Any], original: Callable[..., int]) -> int:
        """The cell asks for a DataLoader's length."""


@contextmanager
def observing(sink: Sink) -> Iterator[None]:
    """Tell `sink` what the code inside the context does with torch."""
    with ExitStack() as stack:
        for owner, name, make in _patches(sink):
            stack.enter_context(replaced(owner, name, make))
        outermost = Outermost(sink)
        stack.callback(optim.register_optimizer_step_pre_hook(outermost.before).remove)
        stack.callback(optim.register_optimizer_step_post_hook(outermost.after).remove)
        yield


def _patches(sink: Sink) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    return [
        # Tensor.backward ends up here as well.
        (torch.autograd, "backward", lambda f: _backward(sink, f)),
        (optim.Optimizer, "__init__", lambda f: _init(sink, f)),
        (DataLoader, "__iter__", lambda f: lambda self: sink.iterate(self, f)),
        (DataLoader, "__len__", lambda f: lambda self: sink.num_batches(self, f)),
        # FSDP's ShardedGradScaler has its own.
        *((cls, "scale", _scale) for cls in _with_own(torch.amp.GradScaler, "scale")),
        (torch.amp.GradScaler, "step", lambda f: _scaler_step(sink, f)),
        (torch.amp.GradScaler, "unscale_", lambda f: _unscale(sink, f)),
        (torch.amp.GradScaler, "update", lambda f: _update(sink, f)),
        # All clipping functions use this one: so they are caught also by names
        # that an earlier cell has imported.
        (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", lambda f: _group(sink, f)),
        *((cls, "step", _schedule(sink)) for cls in _with_own(LRScheduler, "step")),
    ]


def _with_own(cls: type[Any], name: str) -> list[type[Any]]:
    """Return a class and those derived from it, as far as they have their own method `name`."""
    derived = [found for child in cls.__subclasses__() for found in _with_own(child, name)]
    return [cls, *derived] if name in cls.__dict__ else derived


def _backward(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    is_inside = False

    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal is_inside
        if is_inside:  # part of a pass: a checkpoint computes a segment again
            return original(tensors, grad_tensors, *args, **kwargs)
        losses = [tensors] if isinstance(tensors, torch.Tensor) else _listed(tensors)
        grads = None if grad_tensors is None else _listed(grad_tensors)
        weight = sink.before_backward(losses, grads)
        if weight != 1.0:
            grad_tensors = _weighted(losses, grads, weight)
        is_inside, has_failed = True, True
        try:
            result = original(tensors, grad_tensors, *args, **kwargs)
            has_failed = False
        finally:
            is_inside = False
            sink.after_backward(has_failed=has_failed)
        return result

    backward.dtkit_original = original  # type: ignore[attr-defined]  # for `unseen`
    return backward


@contextmanager
def unseen() -> Iterator[None]:
    """Let backward passes within the context be no business of the run's."""
    with replaced(torch.autograd, "backward", lambda f: getattr(f, "dtkit_original", f)):
        yield


def _listed(value: Any) -> list[Any]:
    # A graph edge is a named tuple, hence the second test.
    return (
        list(value) if isinstance(value, tuple | list) and not hasattr(value, "node") else [value]
    )


def _weighted(losses: list[Any], grads: list[Any] | None, weight: float) -> list[Any]:
    """Return the gradients to begin with, such that all that follow are multiplied by `weight`."""
    weighted = []
    for loss, grad in zip(losses, grads or [None] * len(losses), strict=True):
        if grad is not None:
            weighted.append(grad * weight)
        elif isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1:
            weighted.append(torch.full_like(loss, weight))
        else:
            weighted.append(None)  # torch says what is wrong with it
    return weighted


def _init(sink: Sink, original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: optim.Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        _hide_from_compiler()
        sink.optimizer_made(self)

    return __init__


def _hide_from_compiler() -> None:
    """Keep `torch.compile(optimizer.step)` from compiling what our hooks do."""
    rules = sys.modules.get("torch._dynamo.trace_rules")  # an optimizer loads it
    if rules is not None and not _HIDDEN:
        rules.add("dtkit.engine")
        _HIDDEN.append("dtkit.engine")


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if isinstance(outputs, torch.Tensor) and scaled is not outputs:
            scaled.dtkit_unscaled = outputs  # so that the true loss is recorded
            scaled.dtkit_scaler = self
        return scaled

    return scale


def _scaler_step(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        if sink.holds(optimizer):
            sink.hold(optimizer)
            return None
        sink.before_unscaling(optimizer)
        done: list[bool] = []
        handle = optimizer.register_step_post_hook(
            lambda opt, _args, _kwargs: done.append(not found_inf(opt))
        )
        try:
            result = original(self, optimizer, *args, **kwargs)
        finally:
            handle.remove()
        if not any(done):
            sink.step_skipped(optimizer)
        return result

    return step


def _unscale(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    def unscale_(self: Any, optimizer: Any) -> Any:
        if self.is_enabled():
            if sink.holds(optimizer):
                return None
            sink.before_unscaling(optimizer)
        return original(self, optimizer)

    return unscale_


def _update(sink: Sink, original: Callable[..., None]) -> Callable[..., None]:
    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        if not sink.holds_update():
            original(self, *args, **kwargs)

    return update


def _schedule(sink: Sink) -> Callable[[Callable[..., None]], Callable[..., None]]:
    is_inside = False

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def step(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal is_inside
            if is_inside:  # one of several that another runs in turn
                original(self, *args, **kwargs)
            elif not sink.holds_schedule(self):
                is_inside = True
                try:
                    original(self, *args, **kwargs)
                finally:
                    is_inside = False

        return step

    return make


def _group(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    def group(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        may_clip = sink.before_clipping(tensors[0])
        caller = sys._getframe(1)  # noqa: SLF001  it clips, or takes the norm
        if "clip" in caller.f_code.co_name:
            return original([own_parts(tensors[0])], *args, **kwargs) if may_clip else {}
        norm = sink.norm_of(tensors[0], caller.f_locals.get("norm_type", 2.0))
        # One number has the norm that all of them have together.
        return original(tensors if norm is None else [[norm.reshape(1)]], *args, **kwargs)

    return group
