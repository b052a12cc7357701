"""Peers that run scripts from a terminal: torchrun, and Horovod's own launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks.cells import NUM_RANKS
from benchmarks.peers.frontend import variables
from benchmarks.peers.peer import Missing, Peer, Text
from benchmarks.peers.seen import Seen
from benchmarks.processes import TORCHRUN, BenchmarkError, end, family

if TYPE_CHECKING:
    import psutil

__all__ = ["terminals"]

_PIECE_BYTES = 65536
_AT_THE_END = "\ndist.barrier()\ndist.destroy_process_group()\n"
"""What a script needs and a cell does not."""


class _Terminal:
    """A terminal in which scripts are launched, one after another. See `Open`."""

    def __init__(self, folder: Path, python: Path, command: tuple[str, ...]) -> None:
        self.seen = Seen()
        self._folder = folder
        # A terminal is written to line by line, a pipe is not.
        self._environment = {**variables(python), "PYTHONUNBUFFERED": "1"}
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""
        self._all: list[psutil.Process] = []

    def start(self) -> None:
        """Start nothing: each run starts its own processes."""

    def begin(self, text: Text) -> None:
        """Launch a script, in a process group of its own as a shell does."""
        path = self._folder / "script.py"
        needs_end = "dist.init_process_group" in text.code
        path.write_text(text.code + _AT_THE_END * needs_end)
        self._said = b""
        self._process = subprocess.Popen(
            [*self._command, str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self._environment, cwd=self._folder, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self._process,)).start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the launcher's end."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)

    def pull(self, text: Text, begun: Path) -> float:
        """Bring nothing."""
        del text, begun
        msg = "a script has no notebook; it would have to write a file"
        raise Missing(msg)

    def check(self) -> None:
        """Raise BenchmarkError if the script failed."""
        if self._process is not None and self._process.poll():
            tail = self._said[-2000:].decode(errors="replace")
            msg = f"{self._command[0]} ended with {self._process.returncode}:\n{tail}"
            raise BenchmarkError(msg)

    def processes(self) -> list[psutil.Process]:
        """Return the launcher and what is below it."""
        return family(self._process.pid) if self._process is not None else []

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101  opened above
        with process.stdout as pipe:
            while piece := os.read(pipe.fileno(), _PIECE_BYTES):
                self.seen.feed(piece)
                self._said = self._said[-_PIECE_BYTES:] + piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            end(self.processes())
            self._process.wait()


def terminals(python: Path) -> list[Peer]:
    """Return torchrun, and Horovod where `HOROVOD_PYTHON` names an interpreter that has it."""
    torchrun = (str(python), "-m", *TORCHRUN)
    theirs = os.environ.get("HOROVOD_PYTHON", "")
    launcher = shutil.which("horovodrun", path=str(Path(theirs).parent)) if theirs else None
    horovodrun = (
        str(launcher), "--gloo", "-np", str(NUM_RANKS), "-H", f"localhost:{NUM_RANKS}",
        "--network-interfaces", "lo", theirs, "-u",
    )  # fmt: skip
    return [
        Peer(
            "torchrun", ("torch",),
            lambda folder: _Terminal(folder, python, torchrun), keeps=False,
        ),
        Peer(
            "Horovod", ("horovod",),
            lambda folder: _Terminal(folder, Path(theirs), horovodrun), keeps=False,
            dialect="horovod",
            missing="" if launcher else "not here: HOROVOD_PYTHON names no Python that has it",
        ),
    ]  # fmt: skip
