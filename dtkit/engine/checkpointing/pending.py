"""A checkpoint that is being written, as its cell sees it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.errors import CheckpointError

__all__ = ["Pending"]

_WAIT_STEP_S = 0.2


class Pending:
    """A checkpoint that is being written.

    Attributes:
        step: the optimizer step that it was taken after.
        topic: what the ranks' words about it are known by.
        path: where it will be; it is there once `wait` has returned.
        error: what it failed with, None so far or if it did not.
    """

    def __init__(self, step: int, path: Path, topic: str) -> None:
        self.step = step
        self.topic = topic
        self.path = path
        self.error: CheckpointError | None = None
        self._is_done = threading.Event()

    def wait(self) -> Path:
        """Wait until the checkpoint is safe on the disk, on all ranks, and return its path.

        Raises:
            CheckpointError: it could not be written, and those before it are as they were; or it
                was, and one that is too old could not be removed.
        """
        while not self._is_done.wait(_WAIT_STEP_S):  # in steps: an interrupt must get through
            pass
        if self.error is not None:
            raise self.error
        return self.path

    def done(self) -> None:
        """Let go who waits."""
        self._is_done.set()

    def __repr__(self) -> str:
        state = "being written"
        if self._is_done.is_set():
            state = "written" if self.error is None else f"failed: {self.error}"
        return f"<checkpoint of step {self.step}: {state}, {self.path}>"
