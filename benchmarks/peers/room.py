"""One peer in use: opened, started, and opened anew when a task has broken it."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

from benchmarks.cells import NUM_RANKS
from benchmarks.peers.texts import Texts
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.peers.peer import Open, Peer, Text

__all__ = ["Room", "last_s"]

_RUN_TIMEOUT_S = 120.0
_CHECK_TIMEOUT_S = 8.0


class Room:
    """A peer, its open notebook or terminal, and its folder.

    Args:
        peer: that lives here.
        folder: made for it.
    """

    def __init__(self, peer: Peer, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.peer = peer
        self.texts = Texts(peer.dialect)
        self._folder = folder
        self._numbers = itertools.count()
        self._end = contextlib.ExitStack()
        self._opened: Open | None = None
        self.has_trained = False

    def fresh(self) -> Open:
        """Return an open notebook or terminal in which nothing has been started."""
        self.leave()
        self._opened = self._end.enter_context(self.peer.open(self._new_folder()))
        return self._opened

    def ready(self) -> Open:
        """Return what is open, with its ranks started and a name kept on them."""
        if self._opened is None:
            self.fresh().start()
            self.settle()
        assert self._opened is not None  # noqa: S101  for the type checker
        return self._opened

    def settle(self) -> None:
        """Leave the name on the ranks for which `is_kept` asks."""
        if self.peer.keeps:
            self.run(self.texts.keep())

    def run(self, text: Text, timeout_s: float = _RUN_TIMEOUT_S) -> None:
        """Run a text to its end.

        Raises:
            BenchmarkError: it failed, or took longer.
        """
        opened = self.ready()
        opened.begin(text)
        if not opened.wait(timeout_s):
            msg = f"{self.peer.name}: no end in {timeout_s:.0f} s"
            raise BenchmarkError(msg)
        opened.check()

    def is_kept(self) -> bool:
        """Return whether names and process group are still there; if not, all is ended."""
        out = self.out()
        if self.peer.keeps and self._opened is not None:
            self._opened.begin(self.texts.is_kept(out))
            self._opened.wait(_CHECK_TIMEOUT_S)
            if all(out.with_name(f"{out.name}{rank}").exists() for rank in range(NUM_RANKS)):
                return True
        self.leave()
        return False

    def out(self) -> Path:
        """Return a path that no file has, nor one with a rank's number behind it."""
        return self._new_folder() / "at"

    def leave(self) -> None:
        """End all that is open."""
        self._opened = None
        self.has_trained = False
        self._end.close()

    def _new_folder(self) -> Path:
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        return folder


def last_s(out: Path) -> float:
    """Return when the last rank was there, on the clock that all processes share.

    Raises:
        BenchmarkError: one was not.
    """
    paths = [out.with_name(f"{out.name}{rank}") for rank in range(NUM_RANKS)]
    if not all(path.exists() for path in paths):
        msg = "it ended as if all were well, but a rank did not do its part"
        raise BenchmarkError(msg)
    return max(float(path.read_text()) for path in paths)
