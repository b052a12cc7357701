"""A notebook in this process: IPython's shell with the magics, and a cell that trains."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import TYPE_CHECKING, Any

from IPython.core.interactiveshell import InteractiveShell

if TYPE_CHECKING:
    import pytest

__all__ = ["TRAINING", "Notebook", "close_shell", "new_shell", "press_interrupt_when_busy"]

ANSI = re.compile(r"\x1b\[[0-9;]*m")

TRAINING = """\
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
X = torch.randn(256, 8); y = X.sum(1, keepdim=True)
loader = DataLoader(TensorDataset(X, y), batch_size=16, shuffle=True)
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
num_steps = 0
for epoch in range(EPOCHS):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(xb), yb)
        loss.backward()
        optimizer.step()
        num_steps += 1
"""


def new_shell() -> InteractiveShell:
    """Return the shell of this process, with dtkit loaded."""
    shell = InteractiveShell.instance(colors="nocolor")
    shell.run_cell("%load_ext dtkit")
    return shell


def close_shell(shell: InteractiveShell) -> None:
    """Let nothing of it be left."""
    shell.run_cell("%unload_ext dtkit")
    InteractiveShell.clear_instance()


class Notebook:
    """A shell, and what the last cell printed."""

    def __init__(self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = shell
        self._capsys = capsys

    def run(self, cell: str, *, fails: bool = False) -> str:
        """Run a cell; it must succeed, or fail, as said. Returns what it printed."""
        self._capsys.readouterr()
        result = self.shell.run_cell(cell)
        printed = self._capsys.readouterr()
        text = ANSI.sub("", printed.out + printed.err)
        assert result.success is not fails, text
        return text


def press_interrupt_when_busy(session: Any, times: int = 1) -> threading.Thread:
    """Press Interrupt once the ranks are busy, and again twice a second while they are."""

    def press() -> None:
        waiter = threading.Event()
        while not all(rank.state == "busy" for rank in session.status()):
            waiter.wait(0.05)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            waiter.wait(0.5)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread
