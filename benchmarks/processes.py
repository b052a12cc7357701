"""The two sides: torchrun in processes of its own, and a notebook's kernel with dtkit in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from jupyter_client.manager import KernelManager

from benchmarks.cells import NUM_RANKS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "TORCHRUN",
    "BenchmarkError",
    "Launched",
    "Notebook",
    "end",
    "environment",
    "family",
    "torchrun",
]

TIMEOUT_S = 300
TORCHRUN = (
    "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS),
    # A fresh store on a port that the system chooses. Not --standalone: that asks for the
    # address of the host's name, which a container may not have.
    "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
)  # fmt: skip
_END_TIMEOUT_S = 10
_EPILOGUE = """
dist.barrier()
dist.destroy_process_group()
"""
"""What a script needs and a cell does not: rank 0 must not end, and its store with it, first."""


class BenchmarkError(RuntimeError):
    """What was to be measured did not run."""


def environment() -> dict[str, str]:
    """Return the variables that both sides get: one thread a rank, no GPU, loopback."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    }


class Launched:
    """A script that a launcher runs on the ranks. A context that ends it.

    Args:
        command: the launcher's, without the script.
        script: its text.
        folder: where it runs.

    Attributes:
        begun_s: `time.monotonic()` just before it was started.
    """

    def __init__(self, command: Sequence[str], script: str, folder: Path) -> None:
        path = folder / "script.py"
        path.write_text(script)
        self._name = Path(command[0]).name
        self._log = folder / "log.txt"
        with self._log.open("w") as log:
            self.begun_s = time.monotonic()
            self._process = subprocess.Popen(
                [*command, str(path)],
                stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=folder,
            )  # fmt: skip

    def check(self) -> None:
        """Raise BenchmarkError if it failed."""
        if self._process.poll():
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            msg = f"{self._name} ended with {self._process.returncode}:\n{tail}"
            raise BenchmarkError(msg)

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait(TIMEOUT_S)
        self.check()

    def processes(self) -> list[psutil.Process]:
        """Return its processes."""
        return family(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process.poll() is None:
            end(self.processes())
        self._process.wait()


def torchrun(script: str, folder: Path) -> Launched:
    """Run a script under torchrun; it must import `dist`."""
    return Launched([sys.executable, "-m", *TORCHRUN], script + _EPILOGUE, folder)


class Notebook:
    """A real kernel without a front end: cells run as in JupyterLab, its messages are read.

    Args:
        folder: where it runs.
        variables: environment variables besides those of `environment`.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self._manager = KernelManager(transport="ipc", connection_file=str(folder / "kernel.json"))
        self._manager.start_kernel(env={**environment(), **variables}, cwd=str(folder))
        self._client: Any = self._manager.client()  # untyped in part
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self._pool = ThreadPoolExecutor(1)
        self._run: Future[None] | None = None
        self.run("import os")  # and whatever the kernel itself loads with its first cell

    @property
    def pid(self) -> int:
        """The kernel's own process: the driver."""
        return int(self._manager.provisioner.pid)  # type: ignore[union-attr]

    def run(self, cell: str) -> None:
        """Run a cell to its end.

        Raises:
            BenchmarkError: it raised.
        """
        shown: list[str] = []

        def keep_text(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                shown.append(message["content"]["text"])

        reply = self._client.execute_interactive(
            cell, timeout=TIMEOUT_S, output_hook=keep_text, allow_stdin=False
        )["content"]
        if reply["status"] != "ok":
            trace = [f"{reply.get('ename')}: {reply.get('evalue')}", *reply.get("traceback", ())]
            msg = "\n".join(["the cell failed:", cell[:500], *shown, *trace])
            raise BenchmarkError(msg)

    def begin(self, cell: str) -> None:
        """Run a cell and return at once; `wait` waits for its end."""
        self._run = self._pool.submit(self.run, cell)

    def check(self) -> None:
        """Raise BenchmarkError if the cell failed that was begun."""
        if self._run is not None and self._run.done():
            self._run.result()

    def has_ended(self) -> bool:
        """Whether the cell that was begun has ended."""
        return self._run is None or self._run.done()

    def wait(self) -> None:
        """Wait for the cell that was begun."""
        if self._run is not None:
            self._run.result(TIMEOUT_S)

    def processes(self) -> list[psutil.Process]:
        """Return the kernel, controller, engines and everything below them."""
        return family(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        processes = self.processes()
        with contextlib.suppress(BenchmarkError, TimeoutError):
            self.run("%reload_ext dtkit\n%dist_shutdown")
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        end([p for p in processes if p.is_running()])
        self._pool.shutdown(wait=False)


def family(pid: int) -> list[psutil.Process]:
    """Return a process and everything below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(processes: list[psutil.Process]) -> None:
    """Terminate processes, and kill those that do not follow."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
