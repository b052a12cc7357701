"""What an exported script is run with: the group of its ranks, and the plain cell's help.

`%dist_export` writes scripts that import this; nothing else of dtkit need run.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.compression import Compression
from dtkit.driver.runs.create import create_run
from dtkit.engine.accumulate import Accumulation
from dtkit.engine.autopilot import Autopilot
from dtkit.engine.control import Control
from dtkit.engine.observe import observing
from dtkit.engine.recorder import Recorder
from dtkit.engine.reduce.wire import Wire
from dtkit.engine.stepping import Stepping
from dtkit.engine.watch import Watch
from dtkit.events import Note, RankStarted
from dtkit.horovod.engine import report_to
from dtkit.horovod.place import place_of
from dtkit.horovod.rendezvous import make_group
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.driver.runs.run import Run
    from dtkit.engine.parallel.layout import Layout

__all__ = ["Training", "begin", "join"]


class _Joined:
    """Where this process is, once `join` was called."""

    device = torch.device("cpu")
    local_rank = 0


def join() -> tuple[int, int, int, torch.device, Any]:  # Any: the module torch.distributed
    """Join the ranks that the launcher started; alone without one.

    Returns:
        rank, local_rank, world_size, device and torch.distributed.
    """
    place = place_of(os.environ)
    if not dist.is_initialized():
        make_group(place)
    local_rank = place.local_rank or 0
    if "nccl" in dist.get_backend_config():
        _Joined.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(_Joined.device)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (place.local_size or place.size)))
    _Joined.local_rank = local_rank
    return dist.get_rank(), local_rank, dist.get_world_size(), _Joined.device, dist


class Training:
    """A training cell in a script: between `begin` and `end` it is made data parallel.

    Args:
        recipe: how it is trained.
        name: of the run and its folder in `dtkit_runs`.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.rank: int = dist.get_rank()
        ranks = tuple(range(dist.get_world_size()))
        self._run: Run | None = None
        shared: list[Any] = [None]
        source = _source()
        if self.rank == 0:
            self._run = create_run(
                Path("dtkit_runs"), source, recipe=recipe, options=RunOptions(), ranks=ranks,
                name=name,
            )  # fmt: skip
            shared = [(str(self._run.dir), self._run.start_unix_s)]
        dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
        folder, start_unix_s = shared[0]
        path = Path(folder) / f"rank-{self.rank}.jsonl"
        self._recorder = Recorder(self.rank, _Joined.device, start_unix_s, path, lambda _: None)
        self._recorder.start()
        self._autopilot = self._make_autopilot(recipe, len(ranks))
        stepping = Stepping(Accumulation(1), None, self._autopilot)
        watch = Watch(self._recorder, Control(), self._autopilot, stepping)
        self._stack = ExitStack()
        if self._autopilot is not None:
            self._autopilot.prepare(source, vars(sys.modules["__main__"]))
        device = str(_Joined.device)
        self._recorder.emit(RankStarted(self.rank, os.getpid(), "", device, time.time()))
        self._stack.enter_context(observing(watch))
        if self._autopilot is not None:
            self._stack.enter_context(self._autopilot.flying())
        report_to(self)
        self._stack.callback(report_to, None)

    def end(self) -> None:
        """Take the help away; what was trained stays."""
        self._stack.close()
        if self._autopilot is not None and self.rank == 0:
            self._note(self._autopilot.summary())
        self._recorder.ended("finished")
        self._recorder.close()
        dist.barrier()
        if self._run is not None:
            self._run.end("finished")

    def stand_back(self, params: Sequence[torch.Tensor], reason: str) -> None:
        """Leave parameters, and how data is divided, to whoever distributes them already."""
        if self._autopilot is not None:
            self._autopilot.stand_back(params, reason)

    def waited(self, seconds: float) -> None:
        """Note that this rank has waited so long for others, until now."""
        self._recorder.waited(seconds)

    def sent(self, sent_bytes: float, raw_bytes: float) -> None:
        """Note what this rank sends, and would send uncompressed."""
        self._recorder.sent(sent_bytes, raw_bytes)

    def _make_autopilot(self, recipe: Recipe, world_size: int) -> Autopilot | None:
        group = dist.group.WORLD
        if recipe.manual or world_size == 1 or group is None:
            return None
        return Autopilot(
            Wire(group, Compression.parse(recipe.compress), self._recorder.sent),
            is_global_batch=recipe.batch == "global",
            note=self._note,
            on_wait=self._recorder.waited,
            on_layout=self._count_for,
        )

    def _count_for(self, layout: Layout) -> None:
        self._recorder.num_holders = layout.num_holders

    def _note(self, text: str) -> None:
        if text:
            self._recorder.emit(Note(self.rank, text))
            if self.rank == 0:
                sys.stderr.write(f"dtkit: {text}\n")


def begin(**recipe: Any) -> Training:  # Any: the fields of Recipe
    """Begin a training cell, on all ranks.

    Args:
        recipe: the fields of `Recipe`, as the flags of `%%dist_train` set them.
    """
    return Training(Recipe(**recipe), Path(sys.argv[0] or "script").stem)


def _source() -> str:
    path = Path(sys.argv[0])
    return path.read_text() if path.is_file() else ""
