"""Methods that make gradients small on their way between ranks, one module each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dtkit.engine.reduce.compressors.base import IN_GRADIENT_UNITS, Compressor, Layout, rehearse

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.compression import Compression

__all__ = ["IN_GRADIENT_UNITS", "Compressor", "Layout", "make_compressor", "rehearse"]


def make_compressor(compression: Compression, layout: Layout) -> Compressor | None:
    """Return the compressor of one bucket, None if its gradients are sent as they are.

    The method `NAME` is the class `Method` of the module `NAME` beside this one.
    """
    if compression.name == "none" or not layout.dtype.is_floating_point:
        return None
    method: Callable[..., Compressor] = import_module(f"{__name__}.{compression.name}").Method
    return method(layout) if compression.value is None else method(layout, compression.value)
