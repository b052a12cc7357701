"""Hooks into torch for the length of a run: the cell's code stays as it is.

What happens in training is told to a `Sink`; this module knows only where in
torch it can be seen. Patched functions keep their signature and result.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim import optimizer as optim
from torch.utils.data import DataLoader

from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Sink", "observing"]

# Any, throughout: the patched functions pass on arguments that are not ours.


class Sink(Protocol):
    """What wants to know; called on the training thread, in program order."""

    def before_backward(self, loss: torch.Tensor) -> float:
        """A backward pass begins; returns the weight of its gradients."""

    def optimizer_made(self, optimizer: optim.Optimizer) -> None:
        """The cell made an optimizer."""

    def zeroed(self, optimizer: optim.Optimizer) -> None:
        """Gradients are about to be cleared."""

    def before_step(self, optimizer: optim.Optimizer, closure: Any) -> Any:
        """A step begins; returns the closure to use."""

    def after_step(self, optimizer: optim.Optimizer) -> None:
        """A step has been done."""

    def step_skipped(self) -> None:
        """The GradScaler found non-finite gradients and made no step."""

    def before_use_of_gradients(self) -> None:
        """Gradients are about to be clipped or unscaled."""

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
        outermost = _Outermost(sink)
        stack.callback(optim.register_optimizer_step_pre_hook(outermost.before).remove)
        stack.callback(optim.register_optimizer_step_post_hook(outermost.after).remove)
        yield


def _patches(sink: Sink) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    clip = torch.nn.utils.clip_grad
    flush_first = _calling_first(sink.before_use_of_gradients)
    return [
        # Tensor.backward ends up here as well.
        (torch.autograd, "backward", lambda f: _backward(sink, f)),
        (optim.Optimizer, "__init__", lambda f: _init(sink, f)),
        (optim.Optimizer, "zero_grad", lambda f: _zero_grad(sink, f)),
        (DataLoader, "__iter__", lambda f: lambda self: sink.iterate(self, f)),
        (DataLoader, "__len__", lambda f: lambda self: sink.num_batches(self, f)),
        (torch.amp.GradScaler, "scale", _scale),
        (torch.amp.GradScaler, "step", lambda f: _scaler_step(sink, f)),
        (torch.amp.GradScaler, "unscale_", flush_first),
        # The inner functions, so that a name bound before the run is caught too.
        (clip, "_get_total_norm", flush_first),
        (clip, "clip_grad_value_", flush_first),
        (torch.nn.utils, "clip_grad_value_", flush_first),
    ]


class _Outermost:
    """Tells a step from the steps of the optimizers that it wraps."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._optimizer: optim.Optimizer | None = None

    def before(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> Any:
        # The same optimizer again: its last step raised and never reached `after`.
        if self._optimizer not in (None, optimizer):
            return None
        self._optimizer = optimizer
        # args[0] is the optimizer itself.
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        closure = self._sink.before_step(optimizer, given)
        return None if closure is given else (args[:1], {**kwargs, "closure": closure})

    def after(self, optimizer: optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._optimizer is optimizer:
            self._optimizer = None
            if not _found_inf(optimizer):
                self._sink.after_step(optimizer)


def _backward(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if grad_tensors is None and all(_is_scalar(loss) for loss in losses):
            weights = [sink.before_backward(loss) for loss in losses]
            if any(weight != 1.0 for weight in weights):
                grad_tensors = [torch.full_like(t, w) for t, w in zip(losses, weights, strict=True)]
        return original(tensors, grad_tensors, *args, **kwargs)

    return backward


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _init(sink: Sink, original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: optim.Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        sink.optimizer_made(self)

    return __init__


def _zero_grad(sink: Sink, original: Callable[..., None]) -> Callable[..., None]:
    def zero_grad(self: optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        sink.zeroed(self)
        original(self, *args, **kwargs)

    return zero_grad


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if isinstance(outputs, torch.Tensor) and scaled is not outputs:
            scaled.dtkit_unscaled = outputs  # so that the true loss is recorded
        return scaled

    return scale


def _scaler_step(sink: Sink, original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        sink.before_use_of_gradients()
        done: list[bool] = []
        handle = optimizer.register_step_post_hook(
            lambda opt, _args, _kwargs: done.append(not _found_inf(opt))
        )
        try:
            result = original(self, optimizer, *args, **kwargs)
        finally:
            handle.remove()
        if not any(done):
            sink.step_skipped()
        return result

    return step


def _found_inf(optimizer: Any) -> bool:
    # Fused optimizers are called even when the step is to be skipped, with this
    # attribute set; their hooks run although the parameters stay as they were.
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _calling_first(action: Callable[[], None]) -> Callable[[Any], Any]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            action()
            return original(*args, **kwargs)

        return function

    return make
