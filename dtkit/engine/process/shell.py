"""The IPython shell of this engine."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython

__all__ = ["current_shell"]


def current_shell() -> Any:  # Any: what the kernel adds to a shell carries no types
    """Return the shell that runs this engine's cells, None in a plain process."""
    return get_ipython()
