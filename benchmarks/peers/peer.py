"""What a peer is to the runner: something that runs a text on two ranks, and can be stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import psutil

    from benchmarks.peers.seen import Seen

__all__ = ["Dialect", "Missing", "Open", "Peer", "Text"]

Dialect = Literal["torch", "horovod"]
"""Whose collectives a text uses."""


class Missing(Exception):  # noqa: N818  a finding, not an error of the benchmark
    """A peer cannot do this, or has not in the time that it was given; says why."""


@dataclass(frozen=True, slots=True)
class Text:
    """A cell, or the same as a script.

    Attributes:
        code: without any peer's own lines.
        is_training: whether it is a training loop, which dtkit runs under `%%dist_train`.
    """

    code: str
    is_training: bool = False


class Open(Protocol):
    """A peer in use: a kernel with its ranks, or a terminal in which scripts are started."""

    @property
    def seen(self) -> Seen:
        """What is shown."""

    def start(self) -> None:
        """Start the ranks; for those that every run starts anew, nothing."""

    def begin(self, text: Text) -> None:
        """Run a text on the ranks, and return at once."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; returns whether it has ended."""

    def interrupt(self) -> None:
        """Press the notebook's ■, or Ctrl-C."""

    def pull(self, text: Text, begun: Path) -> float:
        """Bring the name `model` that `text` makes on rank 0 to where the user is; returns seconds.

        Args:
            text: makes it.
            begun: where `text` notes, as `time.monotonic()`, that the model is made.

        Raises:
            Missing: that cannot be done.
        """

    def check(self) -> None:
        """Raise BenchmarkError if the text that was begun failed."""

    def processes(self) -> list[psutil.Process]:
        """Return all its processes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exc: object) -> None:
        """End all its processes, by pid."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One column of the table.

    Attributes:
        name: as its users call it.
        packages: whose versions are told.
        open: makes it ready in a folder, as far as an open notebook or terminal is.
        keeps: whether processes and names stay from one cell to the next.
        dialect: whose collectives its texts use.
        missing: why it is not here, if it is not.
    """

    name: str
    packages: tuple[str, ...]
    open: Callable[[Path], Open]
    keeps: bool
    dialect: Dialect = "torch"
    missing: str = ""
