"""Replacing an attribute for the length of a run, and putting it back whatever happens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["replaced"]


@contextmanager
def replaced(
    owner: Any, name: str, make: Callable[[Any], Any]
) -> Iterator[None]:  # Any: whatever stands there
    """Let `owner.name` be `make(original)` within the context.

    The replacement keeps the original's name and docstring, so that `?` and
    tracebacks stay what they were.
    """
    original = getattr(owner, name)
    replacement = make(original)
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(replacement, attribute, getattr(original, attribute, None))
    replacement.__wrapped__ = original
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        # Someone may have patched on top of us meanwhile; theirs is not ours to undo.
        if getattr(owner, name) is replacement:
            setattr(owner, name, original)
