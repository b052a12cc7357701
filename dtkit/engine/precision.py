"""`--amp`: the forward passes and losses of an unedited cell in a narrower type.

Autocast is entered where a forward pass begins: at the call of any outermost
module, which a model's call is, and a loss module's. After a forward pass that
trains (gradients on, module in training mode) it stays on, because the loss
comes next, be it a function or a few lines of the cell's own; it ends when
`backward()` begins, and at the latest when the next batch is drawn or an
optimizer steps. After any other forward pass (evaluation, `no_grad`) it ends at
once. What the outermost module returns is given back as float32, so that
`.numpy()` and the cell's own arithmetic find what they find without `--amp`.
Everything else in the cell, backward passes included, is computed as written.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.utils import _pytree as pytree

from dtkit.engine.loss_scale import LossScale
from dtkit.engine.models import parameters_of
from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.optim import Optimizer

__all__ = ["Precision", "make_precision", "measure_slowdown", "slowdown_note"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WORTH_A_NOTE = 1.1
_PROBE_SIZE = 256
_PROBE_ROUNDS = 7

# Any, below: what modules take and return.


class Precision:
    """Autocast and, for float16, loss scaling.

    Args:
        name: `bf16` or `fp16`.
        device: where the models are.
        note: takes a line for the user.
    """

    def __init__(self, name: str, device: torch.device, note: Callable[[str], None]) -> None:
        self._dtype = _DTYPES[name]
        self._device_type = device.type
        self._note = note
        self._is_users = False
        """Whether the cell uses autocast or a GradScaler itself."""
        self._is_inside = False
        self._window: torch.autocast | None = None
        self._loss_scale = LossScale() if name == "fp16" else None
        self._unscaled: WeakSet[Optimizer] = WeakSet()
        """Those whose gradients, for the step to come, have been divided by the scale."""
        self._is_update_due = False

    @property
    def scales_losses(self) -> bool:
        """Whether losses are scaled here."""
        return self._loss_scale is not None and not self._is_users

    @property
    def num_skipped(self) -> int:
        """How many steps were skipped."""
        return 0 if self._loss_scale is None else self._loss_scale.num_skipped

    def prepare(self, source: str) -> None:
        """Look at the cell before it runs."""
        if re.search(r"\b(autocast|GradScaler)\b", source):
            self._stand_aside()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch for forward passes within the context."""
        try:
            with replaced(torch.nn.Module, "__call__", self._calling):
                yield
        finally:
            self.close_window()

    def close_window(self) -> None:
        """Compute as written from here on."""
        window, self._window = self._window, None
        if window is not None:
            window.__exit__(None, None, None)

    def before_backward(self, losses: Sequence[Any], *, may_update: bool) -> float:
        """End the forward pass; return what the losses are to be multiplied with.

        Args:
            losses: they are backpropagated.
            may_update: whether no gradients are kept that carry the scale so far.
        """
        self.close_window()
        if self._loss_scale is None or self._is_users:
            return 1.0
        if any("dtkit_unscaled" in getattr(loss, "__dict__", ()) for loss in losses):
            self._stand_aside()
            return 1.0
        # Here and not after a step: another optimizer may step after it, with gradients
        # that carry the same scale.
        if self._is_update_due and may_update:
            self._loss_scale.update()
            self._is_update_due = False
        return self._loss_scale.value

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, once before a step."""
        if self._loss_scale is None or self._is_users or optimizer in self._unscaled:
            return
        self._unscaled.add(optimizer)
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        self._loss_scale.unscale(id(optimizer), grads)

    def may_step(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer's gradients are finite; they are unscaled afterwards."""
        if self._loss_scale is None or self._is_users:
            return True
        self.unscale(optimizer)
        self._unscaled.discard(optimizer)
        self._is_update_due = True
        return self._loss_scale.was_finite(id(optimizer))

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on from here must know."""
        scale = self._loss_scale
        return {} if scale is None else scale.state() | {"is_due": self._is_update_due}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave; of a run in another precision nothing is taken over."""
        if self._loss_scale is not None and state:
            self._loss_scale.load(state)
            self._is_update_due = state["is_due"]

    def summary(self) -> str:
        """Return what became of the loss scale, "" if there is nothing to say."""
        scale = self._loss_scale
        if scale is None or self._is_users or not scale.num_skipped:
            return ""
        num = scale.num_skipped
        return (
            f"{num} step{'' if num == 1 else 's'} skipped while the loss scale was found "
            f"(now {scale.value:g})"
        )

    def _calling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            __tracebackhide__ = True
            if self._is_inside or self._is_users:
                return original(module, *args, **kwargs)
            return self._forward(module, lambda: original(module, *args, **kwargs))

        return __call__

    def _forward(self, module: torch.nn.Module, compute: Callable[[], Any]) -> Any:
        __tracebackhide__ = True
        if self._window is None:
            if torch.is_autocast_enabled(self._device_type):
                self._stand_aside()
                return compute()
            self._window = torch.autocast(self._device_type, dtype=self._dtype)
            self._window.__enter__()
        self._is_inside = True
        try:
            output = compute()
        except BaseException:
            self.close_window()
            raise
        finally:
            self._is_inside = False
        if not (torch.is_grad_enabled() and module.training):
            self.close_window()
        return pytree.tree_map_only(torch.Tensor, self._widen, output)

    def _widen(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype is self._dtype else tensor

    def _stand_aside(self) -> None:
        if not self._is_users:
            self._is_users = True
            self.close_window()
            self._note("--amp: the cell uses autocast or a GradScaler itself and is left to it")


def make_precision(
    name: str, device: torch.device, note: Callable[[str], None]
) -> Precision | None:
    """Return what `--amp` asks for, None for `off`; `note` is told if it is slower here."""
    if name == "off":
        return None
    text = slowdown_note(name, measure_slowdown(name, device), device)
    if text:
        note(text)
    return Precision(name, device, note)


def measure_slowdown(name: str, device: torch.device) -> float:
    """Return how much longer a small matrix product takes in a precision than in float32."""
    wide = torch.randn(_PROBE_SIZE, _PROBE_SIZE, device=device)
    return _best_s(wide.to(_DTYPES[name])) / _best_s(wide)


def slowdown_note(name: str, slowdown: float, device: torch.device) -> str:
    """Return a line if a precision is slower than float32 here, "" if it is not."""
    if slowdown < _WORTH_A_NOTE:
        return ""
    kind = "CPU" if device.type == "cpu" else "GPU"
    return (
        f"--amp {name} makes this {kind} slower: a matrix product of {_PROBE_SIZE} × {_PROBE_SIZE} "
        f"takes {slowdown:.1f} times as long as in float32"
    )


def _best_s(matrix: torch.Tensor) -> float:
    times = []
    for _ in range(_PROBE_ROUNDS):
        if matrix.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
