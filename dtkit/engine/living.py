"""What is alive in this process, of a kind: models, optimizers, meshes that no name leads to.

To look for it takes 30 to 60 ms in a process that has loaded torch and its compiler, so what is
asked for often, or while others wait, is noted as it is made.
"""

from __future__ import annotations

import gc
import itertools
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["alive", "living", "note", "noted"]

T = TypeVar("T")

_NOTED: dict[type[Any], dict[int, ref[Any]]] = {}
"""By class, and by id since a user's class may have no hash; for the life of the process."""


def living(kind: type[T]) -> list[T]:
    """Look for every object of a class that is alive; returns the oldest first.

    What was there before the first cell is frozen (see `preload`) and not among them.
    """
    # Hundreds of thousands of objects: each line here runs in C.
    objects = gc.get_objects()
    # type(), not isinstance: an arbitrary object's __class__ may run code.
    types = list(map(type, objects))
    wanted = {found for found in set(types) if issubclass(found, kind)}
    if not wanted:
        return []
    return list(itertools.compress(objects, map(wanted.__contains__, types)))


def note(kind: type[Any]) -> None:
    """Note every object of a class that is made from now on; harmless twice.

    Where torch's compiler notes modules, too (`torch._dynamo.mutation_guard`).
    """
    if kind not in _NOTED:
        known = _NOTED[kind] = {}
        # The second for copies, and for what comes out of a file.
        for name in ("__init__", "__setstate__"):
            setattr(kind, name, _noting(getattr(kind, name), known))


def noted(kind: type[T]) -> list[T]:
    """Return those that are alive, the oldest first; copies by a class's own way may be lacking."""
    found = (known() for known in list(_NOTED.get(kind, {}).values()))
    return [each for each in found if each is not None]


def alive(kind: type[T]) -> list[T]:
    """Return those that are noted, or look for them where none is: in a script."""
    return noted(kind) if kind in _NOTED else living(kind)


def _noting(original: Callable[..., None], known: dict[int, ref[Any]]) -> Callable[..., None]:
    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        key = id(self)
        if key not in known or known[key]() is not self:
            known[key] = ref(self, lambda _: known.pop(key, None))
        original(self, *args, **kwargs)

    return method
