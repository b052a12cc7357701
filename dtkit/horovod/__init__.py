"""Horovod's interface on torch.distributed; `dtkit.horovod.torch` is the part that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtkit.horovod.launch.function import run

__version__ = "0.28.1"
"""Of Horovod whose interface this is: scripts compare it."""

__all__ = ["run"]


def __getattr__(name: str) -> Any:  # Any: a module attribute
    if name == "run":
        from dtkit.horovod.launch.function import run

        return run
    msg = f"module 'horovod' has no attribute {name!r}"
    raise AttributeError(msg)
