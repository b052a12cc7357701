"""TensorBoard itself: a process on loopback that ends with its session and with the kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from html import escape
from typing import TYPE_CHECKING

from dtkit.errors import DtkitError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Boards", "TensorBoard", "address", "has_events"]

_START_TIMEOUT_S = 60.0
_POLL_S = 0.05
_END_TIMEOUT_S = 5.0
# PR_SET_PDEATHSIG (1): the kernel of Linux ends it when the notebook's kernel is killed.
_CODE = (
    "import ctypes, signal\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "from tensorboard.main import run_main\n"
    "run_main()\n"
)
_URL = re.compile(r"http://[^:/\s]+:(\d+)")


class TensorBoard:
    """A TensorBoard that shows a folder.

    Args:
        folder: the logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port: int = 0
        # "a": the process shares the file's position, which reading moves.
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  it lives as long as the process
        # Its own data server is a second process that could be left behind: --load_fast=false.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, "--logdir", str(folder), "--host", "127.0.0.1",
             "--port", "0", "--load_fast", "false", "--reload_interval", "2"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            # A kernel that is shut down signals its whole group, itself too, if a child is in it.
            start_new_session=True,
        )  # fmt: skip
        try:
            self.port = self._wait_for_port()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it answers still."""
        return self._process.poll() is None

    def _repr_html_(self) -> str:
        url = escape(address(self.port), quote=True)
        return (
            f'<iframe src="{url}" title="TensorBoard of {escape(str(self.folder), quote=True)}" '
            f'width="100%" height="800" style="border:0"></iframe>'
            f'<div><a href="{url}" target="_blank">{url}</a></div>'
        )

    def __repr__(self) -> str:
        return f"TensorBoard of {self.folder} at {address(self.port)}"

    def close(self) -> None:
        """End it; safe to call twice."""
        if self.is_alive:
            self._process.terminate()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _wait_for_port(self) -> int:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self.is_alive:
            found = _URL.search(self._said())
            if found:
                return int(found[1])
            time.sleep(_POLL_S)
        msg = f"TensorBoard did not start; it said:\n{self._said()[-2000:].strip() or 'nothing'}"
        raise DtkitError(msg)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


class Boards:
    """The TensorBoards that somebody has open, one per folder."""

    def __init__(self) -> None:
        self._open: dict[Path, TensorBoard] = {}

    def open(self, folder: Path) -> TensorBoard:
        """Return the TensorBoard of a folder; it is started if it does not run.

        Raises:
            DtkitError: it does not start.
        """
        folder = folder.expanduser().resolve()
        board = self._open.get(folder)
        if board is None or not board.is_alive:
            if board is not None:
                board.close()
            board = self._open[folder] = TensorBoard(folder)
        return board

    def close(self) -> None:
        """End them all."""
        while self._open:
            self._open.popitem()[1].close()


def address(port: int, environment: Mapping[str, str] = os.environ) -> str:
    """Return where a browser reaches a port of this host.

    `TENSORBOARD_PROXY_URL` is used as TensorBoard's own magic does (`%PORT%` stands
    for the port); under JupyterHub with jupyter-server-proxy it is the user's prefix.
    """
    proxy = environment.get("TENSORBOARD_PROXY_URL")
    if proxy:
        return proxy.replace("%PORT%", str(port))
    prefix = environment.get("JUPYTERHUB_SERVICE_PREFIX")
    if prefix and importlib.util.find_spec("jupyter_server_proxy") is not None:
        return f"{prefix.rstrip('/')}/proxy/{port}/"
    return f"http://127.0.0.1:{port}/"


def has_events(folder: Path) -> bool:
    """Return whether event files are somewhere in a folder."""
    return next(folder.rglob("events.out.tfevents.*"), None) is not None
