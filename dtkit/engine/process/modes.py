"""Modes of torch that an interrupt can leave switched: they are put back as the cell found them.

A signal that arrives within `__enter__` of `torch.no_grad`, or where an optimizer's step turns
gradients off, leaves them off: the `with` has not begun yet, so nothing ends it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["install"]

_DEVICES = ("cpu", "cuda")

# Any, below: IPython's own.


class _Modes:
    """What was set when each of the cells began that are running, one within the other."""

    def __init__(self) -> None:
        self._found: list[tuple[bool, ...] | None] = []

    def before_cell(self, _info: Any) -> None:
        torch = sys.modules.get("torch")
        self._found.append(_read(torch) if torch is not None else None)

    def after_cell(self, result: Any) -> None:
        found = self._found.pop() if self._found else None
        if found is not None and isinstance(result.error_in_exec, KeyboardInterrupt):
            _set(sys.modules["torch"], found)


def install() -> None:
    """Put modes back after every cell that an interrupt has ended."""
    modes = _Modes()
    events = current_shell().events
    events.register("pre_run_cell", modes.before_cell)
    events.register("post_run_cell", modes.after_cell)


def _read(torch: ModuleType) -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), *map(torch.is_autocast_enabled, _DEVICES))


def _set(torch: ModuleType, found: tuple[bool, ...]) -> None:
    is_grad, *is_autocast = found
    torch.set_grad_enabled(is_grad)
    for device, is_enabled in zip(_DEVICES, is_autocast, strict=True):
        torch.set_autocast_enabled(device, is_enabled)
