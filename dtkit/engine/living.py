"""What is alive in this process, of a kind: models, optimizers, meshes that no name leads to."""

from __future__ import annotations

import gc
import itertools
from typing import TypeVar

__all__ = ["living"]

T = TypeVar("T")


def living(kind: type[T]) -> list[T]:
    """Return every object of a class that the garbage collector knows, the oldest first.

    What was there before the first cell is frozen (see `preload`) and not among them.
    """
    # Hundreds of thousands of objects: each line runs in C.
    objects = gc.get_objects()
    # type(), not isinstance: an arbitrary object's __class__ may run code.
    types = list(map(type, objects))
    wanted = {found for found in set(types) if issubclass(found, kind)}
    return list(itertools.compress(objects, map(wanted.__contains__, types)))
