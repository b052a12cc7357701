"""The one function that is sent to engines: call another by name."""

from __future__ import annotations

from typing import Any

__all__ = ["call_by_name"]


def call_by_name(function: str, args: tuple[Any, ...]) -> Any:  # Any: whatever the function takes
    """Import `module:function` on the engine and call it."""
    import importlib  # inside: ipyparallel sends this function's code alone

    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*args)
