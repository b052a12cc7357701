"""Peers whose ranks stay while the notebook is open."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from benchmarks.peers.frontend import FrontEnd
from benchmarks.peers.peer import Missing, Peer, Text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import psutil

    from benchmarks.peers.seen import Seen

__all__ = ["Cells", "InNotebook", "keepers"]

_RUN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Cells:
    """What a user of a peer types.

    Attributes:
        start: the cell that starts the ranks, up to a process group.
        wrap: makes a text a cell that runs on the ranks.
        pull: brings `model` to the notebook.
        no_pull: why nothing does.
        farewell: ends the ranks.
    """

    start: str
    wrap: Callable[[Text], str]
    pull: str = ""
    no_pull: str = ""
    farewell: str = ""


class InNotebook:
    """A notebook with a peer in it. See `Open`."""

    def __init__(self, folder: Path, python: Path, cells: Cells) -> None:
        self._folder = folder
        self._python = python
        self._cells = cells
        self._page = self._open()

    @property
    def seen(self) -> Seen:
        """What the page shows."""
        return self._page.seen

    def start(self) -> None:
        """Run the cell that starts the ranks."""
        self._page.run(self._cells.start.replace("{folder}", str(self._folder)))

    def begin(self, text: Text) -> None:
        """Send the text as the peer's cell."""
        self._page.begin(self._cells.wrap(text))

    def wait(self, timeout_s: float) -> bool:
        """Wait for the cell's end."""
        return self._page.wait(timeout_s)

    def interrupt(self) -> None:
        """Press ■."""
        self._page.interrupt()

    def pull(self, text: Text, begun: Path) -> float:
        """Make the model, then bring it; the time of the second."""
        del begun  # what was made stays, and is brought by a cell of its own
        if self._cells.no_pull:
            raise Missing(self._cells.no_pull)
        self._page.run("import torch", _RUN_TIMEOUT_S)
        self._page.run(self._cells.wrap(text), _RUN_TIMEOUT_S)
        begun_s = time.monotonic()
        self._page.run(self._cells.pull, _RUN_TIMEOUT_S)
        took_s = time.monotonic() - begun_s
        self._page.run("assert model[0].shape == (4096, 4096); model = None")
        self._page.run(self._cells.wrap(Text("model = None")))
        return took_s

    def check(self) -> None:
        """Raise BenchmarkError if the cell failed."""
        self._page.check()

    def processes(self) -> list[psutil.Process]:
        """Return the kernel and what is below it."""
        return self._page.processes()

    def _open(self) -> FrontEnd:
        return FrontEnd(self._folder, self._python, IPYTHONDIR=str(self._folder / "ipython"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._page.close(self._cells.farewell)


class _Replaced(InNotebook):
    """jupyter-distributed: the notebook's kernel is replaced by one that passes cells on."""

    def _open(self) -> FrontEnd:
        return FrontEnd(self._folder, self._python)

    def start(self) -> None:
        """Put the kernel in place of the present one, as the server does for *Processes: 2*."""
        self._page.close("")
        self._page = FrontEnd(
            self._folder,
            self._python,
            module="jupyter_distributed.kernel",
            interrupt_mode="message",
            JUPYTER_DISTRIBUTED_BASE_KERNEL="python3",
            JUPYTER_DISTRIBUTED_WORLD_SIZE="2",
        )
        self._page.subscribe("jupyter.distributed.rank_updates")


_DTKIT = Cells(
    start="%load_ext dtkit\n%dist_init -n 2 --devices cpu",
    wrap=lambda text: ("%%dist_train\n" if text.is_training else "%%dist\n") + text.code,
    pull="%dist_pull model",
    farewell="%dist_shutdown",
)

_START_IPYPARALLEL = """\
import ipyparallel as ipp

cluster = ipp.Cluster(n=2, log_level=40)
client = cluster.start_and_connect_sync(activate=True)
client[:].scatter("rank", range(2), flatten=True, block=True)
client[:].execute('''
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2)
''', block=True)
"""
"""As its documentation starts a cluster; the process group is the user's own."""

_IPYPARALLEL = Cells(
    start=_START_IPYPARALLEL,
    wrap=lambda text: "%%px\n" + text.code,
    pull="model = client[0].pull('model', block=True)",
    farewell="cluster.stop_cluster_sync()",
)

_START_NBDISTRIBUTED = """\
from nbdistributed.communication import CommunicationManager
from nbdistributed.process_manager import ProcessManager

workers = ProcessManager()
comm = CommunicationManager(2, workers.start_workers(2))
comm.output_callback = lambda rank, text, stream: print(f"Rank {rank}: {text}")
while True:  # a message to a worker that is not there yet is lost
    try:
        comm.send_to_all("execute", "pass", timeout=1.0)
        break
    except TimeoutError:
        pass

def run(code):
    for rank, answer in comm.send_to_all("execute", code, timeout=600).items():
        if "error" in answer:
            print(f"Rank {rank}:", answer["error"], answer["traceback"])
"""
"""What its magics call. They look for a cell's end every 0.1 s besides, and give up after 30 s.

Those that end workers (`%dist_shutdown`, `%dist_reset`) are left alone: they end processes that
they find by name, other people's too.
"""

_NBDISTRIBUTED = Cells(
    start=_START_NBDISTRIBUTED,
    wrap=lambda text: f"run({text.code!r})",
    pull="model = comm.send_to_rank(0, 'get_var', 'model', timeout=600)['value']",
)

_JUPYTER_DISTRIBUTED = Cells(
    start="",
    wrap=lambda text: text.code,
    no_pull="none: the ranks are the kernel, there is nowhere to pull to",
)


def keepers(python: Path) -> list[Peer]:
    """Return the peers whose ranks stay."""

    def notebook(name: str, packages: tuple[str, ...], cells: Cells) -> Peer:
        made = _Replaced if cells is _JUPYTER_DISTRIBUTED else InNotebook
        return Peer(name, packages, lambda folder: made(folder, python, cells), keeps=True)

    return [
        notebook("dtkit", ("dtkit",), _DTKIT),
        notebook("ipyparallel", ("ipyparallel",), _IPYPARALLEL),
        notebook("nbdistributed", ("nbdistributed",), _NBDISTRIBUTED),
        notebook("jupyter-distributed", ("jupyter-distributed",), _JUPYTER_DISTRIBUTED),
    ]
