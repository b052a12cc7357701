"""A start that fails is undone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["undone_by"]


@contextmanager
def undone_by(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` if the block raises, whatever it is."""
    try:
        yield
    except BaseException:
        stop()
        raise
