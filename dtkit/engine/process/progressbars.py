"""tqdm's bars on a rank are text: its widgets would for ever be shown as they are at first."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["install"]

_WIDGETS = "tqdm.notebook"
"""What `tqdm.auto` takes in a Jupyter kernel, which an engine is, but for the page to draw in."""


class _Loader(Loader):
    """Loads a module with the names of tqdm's widgets, and its text behind them."""

    def exec_module(self, module: ModuleType) -> None:
        from tqdm.std import tqdm, trange

        names: dict[str, Any] = vars(module)
        names.update(tqdm=tqdm, tqdm_notebook=tqdm, trange=trange, tnrange=trange)
        names.update(IProgress=tqdm, WARN_NOIPYW="")  # «widgets are there», for `tqdm.auto`


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, _Loader()) if fullname == _WIDGETS else None


def install() -> None:
    """Let `tqdm.notebook` and `tqdm.auto` write text from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
