"""A kernel as a page has it: cells are sent, all that it would show is read as it comes."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from jupyter_client.manager import KernelManager

from benchmarks.peers.seen import Seen
from benchmarks.processes import BenchmarkError, end, environment, family

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

__all__ = ["FrontEnd", "variables"]

_READY_TIMEOUT_S = 60.0
_POLL_MS = 200


def variables(python: Path) -> dict[str, str]:
    """Return the environment of all peers: that of the benchmarks, `python` first on the path."""
    return {
        **environment(),
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


class FrontEnd:
    """A kernel and its page. A context that ends both.

    Args:
        folder: where it runs.
        python: the interpreter.
        module: run as `python -m`; the kernel.
        interrupt_mode: how the server interrupts it: by a `signal` to its process group, as
            usual, or by a `message`.
        more: environment variables.
    """

    def __init__(
        self,
        folder: Path,
        python: Path,
        *,
        module: str = "ipykernel_launcher",
        interrupt_mode: str = "signal",
        **more: str,
    ) -> None:
        self.seen = Seen()
        self._manager = KernelManager(transport="ipc", connection_file=str(folder / "kernel.json"))
        spec: Any = self._manager.kernel_spec  # for the type checker it may be missing
        spec.argv = [str(python), "-m", module, "-f", "{connection_file}"]
        spec.interrupt_mode = interrupt_mode
        self._manager.start_kernel(env={**variables(python), **more}, cwd=str(folder))
        self._client: Any = self._manager.client()  # untyped in part
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=_READY_TIMEOUT_S)
        except RuntimeError as error:
            end(self.processes())
            raise BenchmarkError(str(error)) from None
        self._reply: dict[str, Any] | None = None
        self._cell = ""
        self._is_over = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def begin(self, cell: str) -> None:
        """Send a cell."""
        self._reply = None
        self._cell = self._client.execute(cell, allow_stdin=False)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the answer to the cell; returns whether it came."""
        until_s = time.monotonic() + timeout_s
        while self._reply is None and (left_s := until_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                reply = self._client.get_shell_msg(timeout=left_s)
                if reply["parent_header"].get("msg_id") == self._cell:
                    self._reply = reply["content"]
        return self._reply is not None

    def run(self, cell: str, timeout_s: float = 120.0) -> None:
        """Run a cell to its end.

        Raises:
            BenchmarkError: it failed, or took longer.
        """
        self.begin(cell)
        if not self.wait(timeout_s):
            msg = f"no end in {timeout_s:.0f} s: {cell[:300]}"
            raise BenchmarkError(msg)
        self.check()

    def check(self) -> None:
        """Raise BenchmarkError if the cell has failed."""
        self.wait(0.001)
        if self._reply is not None and self._reply["status"] != "ok":
            lines = [f"{self._reply.get('ename')}: {self._reply.get('evalue')}"]
            lines += self._reply.get("traceback", ())[-5:]
            raise BenchmarkError("\n".join(lines))

    def interrupt(self) -> None:
        """Interrupt as Jupyter's server does."""
        self._manager.interrupt_kernel()

    def subscribe(self, target: str) -> None:
        """Open a comm, as a front-end extension does."""
        content = {"comm_id": target, "target_name": target, "data": {}}
        message = self._client.session.msg("comm_open", content)
        self._client.shell_channel.send(message)

    def processes(self) -> list[psutil.Process]:
        """Return the kernel and everything below it."""
        provisioner: Any = self._manager.provisioner
        return family(int(provisioner.pid))

    def close(self, farewell: str, timeout_s: float = 10.0) -> None:
        """Say farewell, in a cell, if the kernel listens; then end what is left, by pid."""
        processes = self.processes()
        if farewell and self._reply is not None:
            self.begin(farewell)
            self.wait(timeout_s)
        processes += [p for p in self.processes() if p not in processes]
        self._is_over.set()
        self._reader.join()
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        end([p for p in processes if p.is_running()])

    def _read(self) -> None:
        """Read the bytes as they come; nothing is decoded, which would take the ranks' time."""
        socket = self._client.iopub_channel.socket
        while not self._is_over.is_set():
            if socket.poll(_POLL_MS):
                self.seen.feed(b"".join(socket.recv_multipart()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close("")
