"""What is alive in this process, of a kind: models, optimizers, meshes that no name leads to."""

from __future__ import annotations

import gc
import itertools
from typing import TypeVar

__all__ = ["Census", "living"]

T = TypeVar("T")


class Census:
    """Every object that the garbage collector knows, kept alive by this one.

    What was there before the first cell is frozen (see `preload`) and not among them.
    """

    def __init__(self) -> None:
        # Hundreds of thousands of objects: each line here and in `of` runs in C.
        self._objects = gc.get_objects()
        # type(), not isinstance: an arbitrary object's __class__ may run code.
        self._types = list(map(type, self._objects))
        self._kinds = set(self._types)

    def of(self, kind: type[T]) -> list[T]:
        """Return those of a class, the oldest first."""
        wanted = {found for found in self._kinds if issubclass(found, kind)}
        if not wanted:
            return []
        return list(itertools.compress(self._objects, map(wanted.__contains__, self._types)))


def living(kind: type[T]) -> list[T]:
    """Return every object of a class that is alive, the oldest first."""
    return Census().of(kind)
