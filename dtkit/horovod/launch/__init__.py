"""Starting ranks: `horovodrun` on this host, and functions on the ranks of a notebook."""

from __future__ import annotations

from dtkit.horovod.launch.command import main
from dtkit.horovod.launch.function import run

__all__ = ["main", "run"]
