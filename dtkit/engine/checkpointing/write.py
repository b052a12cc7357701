"""Writing a checkpoint: staged on the training thread between two steps, written by another."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from dtkit.checkpoint_files import Manifest, free_name, prune, publish
from dtkit.engine.checkpointing.pending import Pending
from dtkit.engine.checkpointing.ranks import reason
from dtkit.engine.checkpointing.tree import dismantle, renamed, state_here
from dtkit.engine.parallel.styles import contiguous
from dtkit.engine.weights import digest
from dtkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.planner import SavePlan

    from dtkit.engine.checkpointing.ranks import Ranks

__all__ = ["Writer"]

# Any, below: the user's own objects and what their `state_dict` returns.


@dataclass(slots=True)
class _Staged:
    """One checkpoint's content on this rank, out of reach of the training."""

    plan: SavePlan
    planner: DefaultSavePlanner
    writer: FileSystemWriter
    metadata: Metadata
    rest: dict[str, Any]
    temporary: Path


class Writer:
    """Writes checkpoints of one group of ranks into a folder, one at a time.

    Every rank writes a part: of what is equal on all ranks its share, and what
    differs (sharded tensors, replicas that have parted) whole.

    Args:
        folder: where the checkpoints go.
        keep: how many of them stay.
        ranks: who write.
        on_end: called from the writing thread with each checkpoint that ended.
    """

    def __init__(
        self, folder: Path, keep: int, ranks: Ranks, on_end: Callable[[Pending], None]
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        self._on_end = on_end
        self._newest: Pending | None = None
        self._thread: threading.Thread | None = None

    def save(
        self, objects: Mapping[str, Any], extra: dict[str, Any], *, step: int, epoch: int
    ) -> Pending:
        """Take the state of `objects` now and begin to write it; a collective.

        Waits for the one before: at no time are there two in memory.

        Args:
            objects: things with a `state_dict`, by name; the same names on all ranks.
            extra: plain values and tensors of this rank.
            step: of the run.
            epoch: of the run.

        Raises:
            CheckpointError: it cannot be begun; raised on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
        tensors: dict[str, torch.Tensor] = {}
        told = self._ranks.together(lambda: self._survey(objects, tensors, step))
        if any(t["step"] != step or t["names"] != list(objects) for t in told):
            texts = [f"step {t['step']} with {', '.join(t['names'])}" for t in told]
            msg = f"the ranks are not at the same place: {'; '.join(texts)}"
            raise CheckpointError(msg)
        final = self._folder / told[0]["name"]
        pending = Pending(step, final, told[0]["topic"])
        names = _names(tensors, [t["digests"] for t in told], self._ranks.rank)
        rest = {"objects": renamed(told[self._ranks.rank]["outlines"], names), "extra": extra}
        # A fused layer's parts are moved together: what is stored is one piece for each rank.
        staged = self._stage({names[n]: contiguous(t) for n, t in tensors.items()}, rest, final)
        manifest = Manifest(
            step=step, epoch=epoch, world_size=self._ranks.num, names=list(objects), files={},
            time_unix_s=time.time(),
        )  # fmt: skip
        self._thread = threading.Thread(
            target=self._write, args=(staged, pending, manifest), name="dtkit-checkpoint",
            daemon=True,
        )  # fmt: skip
        self._thread.start()
        return pending

    def _survey(
        self, objects: Mapping[str, Any], tensors: dict[str, torch.Tensor], step: int
    ) -> dict[str, Any]:
        """Return what the other ranks must know of this one's state."""
        outlines = {n: dismantle(state_here(o), n, tensors) for n, o in objects.items()}
        if self._ranks.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        return {
            "step": step,
            "names": list(objects),
            "name": free_name(self._folder, step) if self._ranks.rank == 0 else "",
            "topic": secrets.token_hex(8),
            "outlines": outlines,
            # Of a sharded tensor each rank has a part, and all belong together.
            "digests": {
                n: 0 if isinstance(t, DTensor) else digest(t) for n, t in tensors.items()
            },
        }  # fmt: skip

    def _stage(
        self, tensors: dict[str, torch.Tensor], rest: dict[str, Any], final: Path
    ) -> _Staged:
        """Decide who writes what, and copy what this rank writes."""
        temporary = final.with_name(f".{final.name}")
        writer = FileSystemWriter(temporary, sync_files=True, overwrite=False)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        is_first = self._ranks.rank == 0

        def plan() -> SavePlan:
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
                temporary.mkdir()
            planner.set_up_planner(tensors, writer.storage_meta(), is_coordinator=is_first)
            writer.set_up_storage_writer(is_first)
            return planner.create_local_plan()

        # Every rank computes the same global plan: nothing needs to be sent back.
        plans, metadata = planner.create_global_plan(self._ranks.together(plan))
        plans = writer.prepare_global_plan(plans)
        mine = planner.finish_plan(plans[self._ranks.rank])
        wanted = {item.index.fqn for item in mine.items}
        planner.state_dict = {
            name: _copy(tensor) for name, tensor in tensors.items() if name in wanted
        }
        return _Staged(mine, planner, writer, metadata, rest, temporary)

    def _write(self, staged: _Staged, pending: Pending, manifest: Manifest) -> None:
        try:
            self._write_all(staged, pending, manifest)
            self._remove_old(pending)
        except Exception as found:  # noqa: BLE001  it ends the thread, and `Pending` tells it
            if self._ranks.rank == 0:
                shutil.rmtree(staged.temporary, ignore_errors=True)
            pending.error = CheckpointError(
                f"the checkpoint of step {pending.step} was not written: {found}"
            )
        try:
            self._on_end(pending)  # before who waits goes on: it may be the end of the run
        finally:
            pending.done()

    def _remove_old(self, pending: Pending) -> None:
        if self._ranks.rank == 0:
            try:
                prune(self._folder, self._keep)
            except OSError as error:
                pending.error = CheckpointError(
                    f"the checkpoint of step {pending.step} was written, but an older one cannot "
                    f"be removed: {reason(error)}"
                )

    def _write_all(self, staged: _Staged, pending: Pending, manifest: Manifest) -> None:
        def commit(words: list[dict[str, Any]]) -> None:
            staged.writer.finish(staged.metadata, [_results(word["results"]) for word in words])
            for word in words:
                manifest.files.update(word["files"])
            manifest.files[".metadata"] = (staged.temporary / ".metadata").stat().st_size
            publish(staged.temporary, pending.path, manifest)

        try:
            word = self._write_share(staged)
        except Exception as error:  # noqa: BLE001  the word tells it to all ranks
            word = {"error": reason(error)}
        self._ranks.conclude(pending.topic, word, commit, lambda: _num_bytes(staged.temporary))

    def _write_share(self, staged: _Staged) -> dict[str, Any]:
        """Write this rank's files; return their sizes and what is where in them."""
        results = staged.writer.write_data(staged.plan, staged.planner).wait()
        staged.planner.state_dict = {}
        path = staged.temporary / f"rank-{self._ranks.rank}.pt"
        with path.open("wb") as file:
            torch.save(staged.rest, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            msg = f"it holds a value that cannot be loaded safely (weights_only): {error}"
            raise CheckpointError(msg) from error
        paths = {path.name} | {result.storage_data.relative_path for result in results}
        return {
            "files": {name: (staged.temporary / name).stat().st_size for name in sorted(paths)},
            "results": [_described(result) for result in results],
        }


def _names(
    tensors: Mapping[str, torch.Tensor], digests: list[dict[str, int]], rank: int
) -> dict[str, str]:
    """Return what each tensor is stored as: one that is not equal everywhere, by rank."""
    return {
        name: name
        if all(other.get(name, mine) == mine for other in digests)
        else f"rank {rank}/{name}"
        for name, mine in digests[rank].items()
        if name in tensors
    }  # fmt: skip


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
    return tensor.to("cpu", copy=True)


def _described(result: WriteResult) -> list[Any]:
    index, where = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [
        index.fqn, offset, index.index, result.size_in_bytes,
        where.relative_path, where.offset, where.length,
    ]  # fmt: skip


def _results(described: list[list[Any]]) -> list[WriteResult]:
    return [
        WriteResult(
            MetadataIndex(name, None if offset is None else torch.Size(offset), index),
            size,
            _StorageInfo(path, start, length),
        )
        for name, offset, index, size, path, start, length in described
    ]


def _num_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:  # renamed or removed: that is progress too
        return -1
