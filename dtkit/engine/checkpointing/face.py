"""`dtkit.checkpoint` and `dtkit.resume`, in a run and outside of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dtkit.checkpoint_files import Manifest, newest
from dtkit.engine.checkpointing.ranks import Ranks
from dtkit.engine.checkpointing.read import load
from dtkit.engine.checkpointing.write import Writer
from dtkit.engine.process.agent import agent, current_run
from dtkit.engine.process.group import subgroup
from dtkit.errors import CheckpointError

if TYPE_CHECKING:
    from dtkit.engine.checkpointing.part import Checkpoints
    from dtkit.engine.checkpointing.pending import Pending

__all__ = ["Start", "checkpoint", "resume"]

# Any, below: the user's own objects.

_KEEP = 3


@dataclass(frozen=True, slots=True)
class Start:
    """Where training begins: `for epoch in range(start.epoch, num_epochs)`.

    Attributes:
        step: optimizer steps made already.
        epoch: the epoch to begin with. A DataLoader leaves out what was trained
            on of it.
        path: the checkpoint that was loaded, None if training begins anew.
    """

    step: int = 0
    epoch: int = 0
    path: Path | None = None


def checkpoint(folder: str | Path | None = None, /, **objects: Any) -> Pending:
    """Write a checkpoint of objects with a `state_dict`, by name; call it on all ranks.

    In a run, between two steps: returns as soon as the state is copied, and a
    thread writes it; the random state and the place in the data are part of
    it. Without objects it holds those that `dtkit.resume` named, or what the cell
    trains. Outside a run it needs both a folder and objects, and returns when
    all is written.

    Args:
        folder: where to; in a run always the run's own, `checkpoints` in `Run.dir`.
        objects: models, optimizers, schedulers, GradScalers and their like.

    Returns:
        What is being written: `.wait()` returns its path, or raises.

    Raises:
        CheckpointError: it cannot be begun, or outside a run cannot be written;
            on all ranks. Checkpoints that were there are as they were.
    """
    current = _current()
    if current is not None:
        if folder is not None:
            msg = "dtkit.checkpoint: in a run it goes to the run's folder; leave the path out"
            raise CheckpointError(msg)
        return current.take(objects)
    if folder is None or not objects:
        msg = "dtkit.checkpoint: outside a run name a folder and objects: ('ckpt', model=model)"
        raise CheckpointError(msg)
    folder = Path(folder).resolve()
    ranks = Ranks(_group())
    step = ranks.together(lambda: _step_after(folder))[0]
    writer = Writer(folder, _KEEP, ranks, lambda _pending: None)
    pending = writer.save(objects, {}, step=step, epoch=0)
    pending.wait()
    return pending


def resume(path: str | Path | None = None, /, **objects: Any) -> Start:
    """Load objects from a checkpoint, in place, and return where to begin; call it on all ranks.

    In a training cell, once, before its loop: it also says what
    `--checkpoint-every` saves. Without `--resume` it loads nothing and returns
    epoch 0, so that the cell stays the same. A loop that begins at `start.epoch`
    gets from its DataLoader what was not trained on yet, in the same order; the
    random state of each rank is that of the checkpoint.

    All ranks load the same one, or none: what fails on one fails on all.

    Args:
        path: a checkpoint, or a folder of which the newest whole one is taken, as
            the first rank sees it; by default what `--resume` names.
        objects: by the names that they were saved under.

    Raises:
        CheckpointError: there is none, or an object is not in it or does not fit.
    """
    if not objects:
        msg = "dtkit.resume: name what to load: dtkit.resume(model=model, optimizer=optimizer)"
        raise CheckpointError(msg)
    current = _current()
    if current is not None:
        current.register(objects)
    source = current.resume_from if path is None and current is not None else path
    if source is None:
        return Start()
    folder = Path(source).expanduser()
    if current is not None:
        found = current.go_on_from(folder)
    else:
        ranks = Ranks(_group())
        found = ranks.agreed(folder)
        ranks.each(lambda: load(found, objects, ranks.rank, ranks.num))
    manifest = Manifest.read(found)
    return Start(manifest.step, manifest.epoch, found)


def _step_after(folder: Path) -> int:
    found = newest(folder)
    return Manifest.read(found).step + 1 if found is not None else 0


def _group() -> dist.ProcessGroup | None:
    """Return the group of the ranks that run the cell, or the script; None: it is one."""
    try:
        owner = agent()
    except RuntimeError:  # a plain process
        owner = None
    if owner is None or owner.group is None:
        return dist.group.WORLD if dist.is_initialized() else None
    ranks = sorted(owner.cell_ranks) or range(owner.group.world_size)
    return subgroup(owner.group, ranks, f"cell of generation {owner.group.generation}")


def _current() -> Checkpoints | None:
    return getattr(current_run(), "checkpoints", None)
