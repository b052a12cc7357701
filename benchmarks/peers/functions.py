"""Peers that a notebook gives a function, which runs in processes that end with it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.peers.notebooks import Cells, InNotebook
from benchmarks.peers.peer import Peer, Text

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["functions"]

_FUNCTION = """\
def train(*_):
    names = {{"__name__": "__main__"}}
    exec(compile({code!r}, "cell", "exec"), names)
    return names.get("result")
"""


class _Function(InNotebook):
    """What a rank has made comes back with the function, or by a file that the function writes."""

    def pull(self, text: Text, begun: Path) -> float:
        """Run the function; what counts is the time since it had made the model."""
        path = str(self._folder / "model.pt")
        by_file = "torch.load" in self._cells.pull
        bring = f"torch.save(model, {path!r})" if by_file else "result = model"
        self._page.run("import torch")
        self._page.run(self._cells.wrap(Text(f"{text.code}if rank == 0:\n    {bring}\n")))
        if by_file:
            self._page.run(self._cells.pull.replace("{path}", path))
        took_s = time.monotonic() - float(begun.read_text())
        self._page.run("assert model[0].shape == (4096, 4096); model = None")
        return took_s


_BY_FILE = "model = torch.load('{path}', weights_only=False)"

_LAUNCH = """\
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
notebook_launcher(train, num_processes=2, use_port=str(port))
"""

_LAUNCHER = Cells(
    start="import socket\nfrom accelerate import notebook_launcher",
    wrap=lambda text: _FUNCTION.format(code=text.code) + _LAUNCH,
    pull=_BY_FILE,
)

_LAUNCH_FABRIC = """\
model = Fabric(accelerator="cpu", devices=2, strategy="ddp_notebook").launch(train)
"""

_FABRIC = Cells(
    start="from lightning_fabric import Fabric",
    wrap=lambda text: _FUNCTION.format(code=text.code) + _LAUNCH_FABRIC,
    pull="model",
)

_START_RAY = """\
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

ray.init(num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1")
"""

_FIT = """\
TorchTrainer(
    lambda: (train(), None)[1],
    scaling_config=ScalingConfig(num_workers=2),
    torch_config=TorchConfig(backend="gloo"),
).fit()
"""

_RAY = Cells(
    start=_START_RAY,
    wrap=lambda text: _FUNCTION.format(code=text.code) + _FIT,
    pull=_BY_FILE,
    farewell="ray.shutdown()",
)


def functions(python: Path) -> list[Peer]:
    """Return the peers that take a function."""

    def peer(name: str, packages: tuple[str, ...], cells: Cells) -> Peer:
        return Peer(name, packages, lambda folder: _Function(folder, python, cells), keeps=False)

    return [
        peer("notebook_launcher", ("accelerate",), _LAUNCHER),
        peer("Fabric", ("lightning-fabric",), _FABRIC),
        peer("Ray Train", ("ray",), _RAY),
    ]
