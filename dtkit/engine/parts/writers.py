"""A cell's own SummaryWriter: the first rank's writes, so that there is one curve and not N."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dtkit.engine.parts import Part
from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]


class QuietWriters(Part):
    """Lets `torch.utils.tensorboard.SummaryWriter` write nothing on this rank during a run."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def begin(self) -> None:
        """Patch the one method through which everything is written."""
        # The class is the same under whatever name the cell has imported it.
        from torch.utils.tensorboard import SummaryWriter  # loaded by the engine beforehand

        self._stack.enter_context(replaced(SummaryWriter, "_get_file_writer", _nowhere))

    def end(self, state: str) -> None:  # noqa: ARG002  a Part's signature
        """Put it back; a writer that was made in the run goes on to write nothing."""
        self._stack.close()


class _NoFile:
    """Stands for the file of a rank that does not write."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def get_logdir(self) -> str:
        """Return where the file would be."""
        return self._folder

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return _do_nothing


def _nowhere(_original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_file_writer(self: Any) -> Any:  # Any: the SummaryWriter, which is untyped
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = _NoFile(str(self.log_dir))
            self.all_writers = {self.log_dir: self.file_writer}
        # One that an earlier cell made has a file: it stays as it is, and gets nothing.
        return self.file_writer if isinstance(self.file_writer, _NoFile) else _NoFile(self.log_dir)

    return _get_file_writer


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def make(run: ActiveRun) -> Part:
    """Return the part for a run: on its first rank one that does nothing."""
    return Part() if run.rank == min(run.ranks) else QuietWriters()
