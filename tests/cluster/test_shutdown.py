"""A kernel that ends takes its engines with it, whatever they are doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from jupyter_client.manager import KernelManager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jupyter_client.blocking.client import BlockingKernelClient

STUCK = "%%dist\nimport torch\ndist.recv(torch.ones(1), src=1 - rank)"


@pytest.fixture
def manager(
    tmp_path: Path, marked: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelManager]:
    """A kernel manager whose kernel and all that it starts are marked."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
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


def start_engines(client: BlockingKernelClient) -> None:
    reply = client.execute_interactive(
        "%load_ext dtkit\n%dist_init -n 2", timeout=60, output_hook=lambda _message: None
    )
    assert reply["content"]["status"] == "ok"


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
        message = client.get_iopub_msg(timeout=20)
        status = message["content"].get("execution_state", "")
    client.stop_channels()
    manager.shutdown_kernel()
    assert marked.left() == []
