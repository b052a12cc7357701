"""Workers: the processes of a job on this host, started and ended together."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dtkit.errors import InvalidInputError
from dtkit.horovod import world

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["STAND_IN", "Worker", "Workers"]

STAND_IN = Path(__file__).parents[1] / "_path"
"""The folder in which `import horovod` finds dtkit's layer."""
_GRACE_S = 5.0
_POLL_S = 0.05
_SETTLE_S = 2.0


@dataclass(slots=True)
class Worker:
    """One process; `number` stays its own, also when ranks are dealt out anew."""

    number: int
    process: subprocess.Popen[bytes]
    readers: tuple[threading.Thread, ...]

    @property
    def code(self) -> int | None:
        """How it ended, None while it runs."""
        return self.process.poll()


class Workers:
    """Starts processes with the variables of a rank, and passes their output on.

    Args:
        command: what each runs.
        num_workers: how many.
        environment: variables beside the caller's own.
        output_dir: where output is kept as well.
        is_quiet: whether output is not shown.

    Raises:
        InvalidInputError: the command cannot be started, or output cannot be kept.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_workers: int,
        environment: Mapping[str, str],
        output_dir: str | None = None,
        *,
        is_quiet: bool = False,
    ) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._environment["HOROVOD_JOB_ID"] = secrets.token_hex(8)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._is_quiet = is_quiet
        self._lock = threading.Lock()
        self.workers: list[Worker] = []
        try:
            for number in range(num_workers):
                self.workers.append(self._start(number, num_workers))
        except InvalidInputError:
            self.stop()
            raise
        except OSError as error:
            self.stop()
            msg = f"{self._command[0]} cannot be started: {error.strerror}"
            raise InvalidInputError(msg) from None

    def wait(self, is_due: Callable[[], bool] = lambda: False) -> Worker | None:
        """Wait until all have ended well, or one has not; returns that one.

        Args:
            is_due: ends the wait as well.
        """
        while True:
            codes = [worker.code for worker in self.workers]
            for worker, code in zip(self.workers, codes, strict=True):
                if code:
                    return worker
            if None not in codes or is_due():
                return None
            time.sleep(_POLL_S)

    def settle(self) -> list[Worker]:
        """Return those that have failed, also those that do so as a consequence or a cause.

        Which of them came first cannot be told: Python takes its time to end.
        """
        deadline = time.monotonic() + _SETTLE_S
        while None in [worker.code for worker in self.workers] and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return [worker for worker in self.workers if worker.code]

    @property
    def running(self) -> list[int]:
        """The numbers of those that run."""
        return [worker.number for worker in self.workers if worker.code is None]

    def drop(self, worker: Worker) -> None:
        """Go on without a worker that has ended."""
        self.workers.remove(worker)
        for reader in worker.readers:
            reader.join(_GRACE_S)

    def stop(self) -> None:
        """End what is running, by force after a while, and show what it still wrote."""
        for worker in self.workers:
            if worker.code is None:
                worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            for reader in worker.readers:
                reader.join(_GRACE_S)

    def _start(self, number: int, num_workers: int) -> Worker:
        rank, size = str(number), str(num_workers)
        environment = {
            **self._environment,
            "HOROVOD_RANK": rank,
            "HOROVOD_SIZE": size,
            "HOROVOD_LOCAL_RANK": rank,
            "HOROVOD_LOCAL_SIZE": size,
            "HOROVOD_CROSS_RANK": "0",
            "HOROVOD_CROSS_SIZE": "1",
            "PYTHONUNBUFFERED": "1",
            world.WORKER: rank,
        }
        with contextlib.ExitStack() as stack:
            files = {name: self._kept_file(number, name, stack) for name in ("stdout", "stderr")}
            process = subprocess.Popen(
                self._command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.pop_all()  # the readers close them
        readers = tuple(
            self._reader(number, name, stream, files[name])
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
            if stream is not None
        )
        return Worker(number, process, readers)

    def _kept_file(self, number: int, name: str, stack: contextlib.ExitStack) -> IO[bytes] | None:
        if self._output_dir is None:
            return None
        path = self._output_dir / f"rank.{number}" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(path.open("wb", buffering=0))
        except OSError as error:
            msg = f"{path} cannot be written ({error.strerror}): give --output-filename a folder"
            raise InvalidInputError(msg) from None

    def _reader(
        self, number: int, name: str, stream: IO[bytes], kept: IO[bytes] | None
    ) -> threading.Thread:
        thread = threading.Thread(
            target=self._pass_on, args=(number, name, stream, kept), daemon=True
        )
        thread.start()
        return thread

    def _pass_on(self, number: int, name: str, stream: IO[bytes], kept: IO[bytes] | None) -> None:
        with stream, kept or contextlib.nullcontext():
            for line in stream:
                if kept is not None:
                    try:
                        kept.write(line)
                    except OSError as error:  # a rank must not end because the disk is full
                        text = f"its output is not kept any more: {error.strerror}\n"
                        self._show(number, "stderr", text.encode())
                        kept = None
                if not self._is_quiet:
                    self._show(number, name, line)

    def _show(self, number: int, name: str, line: bytes) -> None:
        target = sys.stdout if name == "stdout" else sys.stderr
        text = line.decode(errors="replace").rstrip("\n")
        with self._lock, contextlib.suppress(BrokenPipeError):
            target.write(f"[{number}]<{name}>:{text}\n")
            target.flush()
