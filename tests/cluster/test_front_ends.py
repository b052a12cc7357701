"""What front ends say to a kernel, without one: clicks that come in the shell, or in a subshell.

`DTKIT_IPYKERNEL=FOLDER` tests another ipykernel (`pip install --no-deps --target FOLDER`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipykernel
import pytest
from jupyter_client.manager import KernelManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("DTKIT_IPYKERNEL", "")

TRAINING = """%%dist_train
import time
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(STEPS):
    time.sleep(0.01)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).pow(2).mean().backward()
    optimizer.step()
"""


class FrontEnd:
    """Runs cells in a kernel, keeps its widgets' states, clicks."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join(filter(None, [OTHER, str(ROOT)]))
        self._kernel = KernelManager()
        self._kernel.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": path})
        self._client: Any = self._kernel.client()  # jupyter_client annotates no channels
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self.widgets: dict[str, dict[str, Any]] = {}
        self.subshell: str | None = None

    def begin(self, cell: str) -> str:
        self.widgets.clear()
        return str(self._client.execute(cell))

    def run(self, cell: str) -> str:
        """Run a cell to its end; returns what it showed."""
        return self.go_on(self.begin(cell))

    def go_on(self, cell: str, until: Callable[[], Any] | None = None) -> str:
        """Take what the kernel tells until something is so, or else until a cell has ended."""
        shown, end_s = "", time.monotonic() + 60
        while time.monotonic() < end_s:
            message = self._client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if kind in ("comm_open", "comm_msg"):
                state = self.widgets.setdefault(content["comm_id"], {})
                state.update(content["data"].get("state", {}))
            shown += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            if until is not None and until():
                return shown
            is_mine = message["parent_header"].get("msg_id") == cell
            if is_mine and kind == "status" and content["execution_state"] == "idle":
                assert until is None, "the cell has ended"
                return shown
        pytest.fail(f"the kernel told nothing of it: {shown}")

    def open_subshell(self) -> None:
        """Do what JupyterLab does for its widgets."""
        channel = self._client.control_channel
        channel.send(self._client.session.msg("create_subshell_request"))
        self.subshell = channel.get_msg(timeout=60)["content"]["subshell_id"]

    def button(self, name: str) -> tuple[str, dict[str, Any]]:
        found = (item for item in self.widgets.items() if item[1].get("description") == name)
        return next(found, ("", {}))

    def says(self, name: str) -> str:
        return str(self.button(name)[1].get("tooltip") or "")

    def click(self, name: str) -> None:
        comm, _ = self.button(name)
        content = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
        message = self._client.session.msg("comm_msg", content)
        message["header"]["subshell_id"] = self.subshell
        self._client.shell_channel.send(message)

    def close(self) -> None:
        self._client.stop_channels()
        self._kernel.shutdown_kernel()
        self._kernel.cleanup_resources()


@pytest.fixture
def front_end(tmp_path: Path) -> Iterator[FrontEnd]:
    opened = FrontEnd(tmp_path)
    yield opened
    opened.close()


def test_buttons_work_or_say_why_not(front_end: FrontEnd) -> None:
    version = ipykernel.version_info[:2]
    if OTHER:
        said = front_end.run("import ipykernel; print(*ipykernel.version_info[:2])")
        version = tuple(map(int, said.split()))
    front_end.run("%load_ext dtkit\n%dist_init -n 2")
    for has_subshell in (False, True):
        if has_subshell:
            if version < (7, 0):
                break
            front_end.open_subshell()
        works = version >= (7, 4) or has_subshell
        cell = front_end.begin(TRAINING.replace("STEPS", "100_000" if works else "100"))
        says = "end after the step" if works else "press ■ Interrupt to stop"
        front_end.go_on(cell, lambda says=says: front_end.says("Stop").startswith(says))
        assert front_end.button("Stop")[1]["disabled"] is not works
        if works:
            front_end.click("Stop")
        front_end.go_on(cell)
        state = "stopped" if works else "finished"
        assert state in front_end.run("import dtkit; print(dtkit.last_run)")
    front_end.run("%dist_shutdown")
