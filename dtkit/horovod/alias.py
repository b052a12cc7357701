"""`import horovod.torch` gives dtkit's, where Horovod is not installed or not wanted."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["install", "is_installed", "uninstall"]

_OURS = "dtkit.horovod"
_MOVED = {
    "horovod.common": _OURS,
    "horovod.common.exceptions": f"{_OURS}.errors",
    "horovod.common.process_sets": f"{_OURS}.sets",
    "horovod.torch.mpi_ops": f"{_OURS}.torch",
    "horovod.runner": f"{_OURS}.launch",
}
_OUT = ("tensorflow", "keras", "mxnet", "spark", "ray")


class _Loader(Loader):
    """Loads a module of ours under Horovod's name: it is the same module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002  the interface's
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import machinery has set the alias's


class _Finder(MetaPathFinder):
    """Finds `horovod` and all below it.

    Args:
        is_forced: whether it is ours also where Horovod is installed.
    """

    def __init__(self, *, is_forced: bool) -> None:
        self.is_forced = is_forced

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        top, _, rest = fullname.partition(".")
        if top != "horovod" or not (self._is_ours() if rest else self._becomes_ours()):
            return None
        if rest.split(".")[0] in _OUT:
            msg = (
                f"{fullname}: dtkit has Horovod's interface for torch only; "
                "for others install Horovod itself"
            )
            raise ImportError(msg, name=fullname)
        name = _MOVED.get(fullname, _OURS + fullname.removeprefix("horovod"))
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        return found and ModuleSpec(fullname, _Loader(name))

    def _is_ours(self) -> bool:
        return sys.modules.get("horovod") is sys.modules.get(_OURS, self)

    def _becomes_ours(self) -> bool:
        return self.is_forced or _is_without()


def install(*, is_forced: bool = False) -> None:
    """Let `import horovod` find dtkit's layer from now on; harmless when it does.

    Args:
        is_forced: also where Horovod is installed. Modules of the other one are forgotten.
    """
    uninstall()
    is_ours_now = sys.modules.get("horovod") is sys.modules.get(_OURS)
    if "horovod" in sys.modules and is_ours_now != (is_forced or _is_without()):
        _forget()
    sys.meta_path.insert(0, _Finder(is_forced=is_forced))


def uninstall() -> None:
    """Undo `install`; modules that were imported stay."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def is_installed() -> bool:
    """Return whether `install` was called."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def _forget() -> None:
    for name in [n for n in sys.modules if n == "horovod" or n.startswith("horovod.")]:
        del sys.modules[name]


def _is_without() -> bool:
    """Return whether Horovod is not installed: nothing is found, or a stand-in of ours."""
    found = PathFinder.find_spec("horovod")
    return found is None or str(found.origin).endswith("dtkit/horovod/_path/horovod/__init__.py")
