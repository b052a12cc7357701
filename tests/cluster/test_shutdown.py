"""What becomes of the engines when their kernel ends: a run goes on, all else ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from jupyter_client.manager import KernelManager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jupyter_client.blocking.client import BlockingKernelClient

# jupyter_client interrupts a kernel before it asks it to end; a machine that is busy stops the run.
pytestmark = pytest.mark.alone

TRAINING = """%%dist_train --name lasting
import time
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
print("begin")
for _ in range(10**6):
    optimizer.zero_grad()
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
    time.sleep(0.01)  # as slow as a larger model: the machine is for what is waited for
"""
ATTACH = """%load_ext dtkit
%dist_init --attach
import dtkit
session, run = dtkit.current_session(), dtkit.last_run
"""
STOP = """%dist_stop
run.wait(timeout_s=60)
assert run.state == "stopped"
assert run.history["step"][0] == 1
assert run.output.text_of(1) == "begin\\n"
"""
STUCK = "%%dist\nimport torch\ndist.recv(torch.ones(1), src=1 - rank)"


@pytest.fixture
def manager(
    tmp_path: Path, marked: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelManager]:
    """A kernel manager whose kernel and all that it starts are marked."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # no session but these is found
    manager = KernelManager(transport="ipc", connection_file=str(tmp_path / "kernel.json"))
    with marked.marking():
        manager.start_kernel()
    yield manager
    if manager.is_alive():
        manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


def connect(manager: KernelManager) -> BlockingKernelClient:
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client


def execute(client: BlockingKernelClient, code: str) -> str:
    """Run a cell, which must not fail, and return what it displays as text."""
    shown: list[str] = []

    def keep(message: dict[str, Any]) -> None:
        shown.append(str(message["content"].get("data", {}).get("text/plain", "")))

    reply = client.execute_interactive(code, timeout=60, output_hook=keep)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "\n".join(shown)


def start_engines(client: BlockingKernelClient) -> None:
    execute(client, "%load_ext dtkit\n%dist_init -n 2")


def test_a_restart_ends_the_engines(manager: KernelManager, marked: Any) -> None:
    client = connect(manager)
    start_engines(client)
    assert len(marked.left()) > 2
    client.stop_channels()
    with marked.marking():
        manager.restart_kernel()
    client = connect(manager)
    assert len(marked.left()) == 1  # the new kernel
    client.stop_channels()


def test_engines_that_are_stuck_in_a_collective_end_too(
    manager: KernelManager, marked: Any
) -> None:
    client = connect(manager)
    start_engines(client)
    client.execute(STUCK)
    status = ""
    while status != "busy":
        message = client.get_iopub_msg(timeout=60)
        status = message["content"].get("execution_state", "")
    client.stop_channels()
    manager.shutdown_kernel()
    assert marked.left() == []


def test_a_run_goes_on_through_a_restart_and_the_next_kernel_stops_it(
    manager: KernelManager, marked: Any, tmp_path: Path
) -> None:
    client = connect(manager)
    execute(client, f"%cd {tmp_path}")
    start_engines(client)
    client.execute(TRAINING)
    shown = ""
    while "●" not in shown:  # the dashboard says that it is running
        shown = str(client.get_iopub_msg(timeout=60)["content"])
    client.stop_channels()
    with marked.marking():
        manager.restart_kernel()
    client = connect(manager)
    assert "attached: session" in execute(client, ATTACH)
    execute(client, STOP)
    assert "■ stopped" in execute(client, "run")
    execute(client, "%%dist\ndist.all_reduce(torch.ones(1))")
    client.stop_channels()
    manager.shutdown_kernel()
    assert marked.left() == []
