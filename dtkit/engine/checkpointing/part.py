"""Checkpoints of a run: `--checkpoint-every`, and the place that `--resume` goes on from."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch.optim import Optimizer

from dtkit.checkpoint_files import FOLDER, Manifest, whole
from dtkit.engine.checkpointing.ranks import Ranks
from dtkit.engine.checkpointing.read import load
from dtkit.engine.checkpointing.source import find_objects
from dtkit.engine.checkpointing.write import Writer
from dtkit.engine.parts import Part
from dtkit.engine.process.shell import current_shell
from dtkit.errors import CheckpointError

if TYPE_CHECKING:
    from dtkit.engine.checkpointing.pending import Pending
    from dtkit.engine.run import ActiveRun

__all__ = ["Checkpoints", "make"]

# Any, below: the user's own objects.


class Checkpoints(Part):
    """Takes checkpoints of a run when asked, and lets it go on from one.

    Every run has it, so it sees one moment of a step only.

    Args:
        run: the run.
        keep: how many are kept.
        resume: the checkpoint that the cell shall go on from; "": none.
    """

    def __init__(self, run: ActiveRun, *, keep: int, resume: str) -> None:
        self.keep = keep
        self.resume_from = Path(resume) if resume else None
        self._run = run
        self._folder = run.dir / FOLDER
        self._ranks = Ranks(run.group)
        self._writer = Writer(self._folder, keep, self._ranks, self._ended)
        self._given: dict[str, Any] = {}
        # Neither keeps alive what the cell has done with.
        self._optimizers: dict[int, ref[Optimizer]] = {}
        self._names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._pending: Pending | None = None

    def register(self, objects: dict[str, Any]) -> None:
        """Let checkpoints hold these objects, and not what is found in the cell."""
        self._given = dict(objects)

    def go_on_from(self, folder: Path) -> Path:
        """Load the registered objects, the random state and the data position.

        Args:
            folder: a checkpoint, or a folder with some.

        Returns:
            The checkpoint, the same on all ranks.

        Raises:
            CheckpointError: there is none, or a rank cannot load it; on all ranks.
        """
        position, ranks = self._run.position, self._ranks
        if self._pending is not None:  # it shall be the newest
            with contextlib.suppress(CheckpointError):  # `_ended` has told it
                self._pending.wait()
        if self._run.wire is not None:
            self._run.wire.before_collective()
        path = ranks.agreed(folder)
        extra = ranks.each(lambda: load(path, self._given, ranks.rank, ranks.num))
        optimizers = _optimizers(self._given)
        if self._run.autopilot is not None:
            self._run.autopilot.settle(optimizers.values())
        manifest = Manifest.read(path)
        where = f"{path.name} of {path.parent.parent.name} (epoch {manifest.epoch})"
        if not extra:
            position.step = manifest.step
            by = f" on {ranks.num} ranks, written by {manifest.world_size}"
            self._say(
                f"resumed from {where}{by if extra is None else ', written outside of a run'}: "
                "weights and optimizer, but neither random state, nor place in the epoch, nor what "
                "compression had left out"
            )
        else:
            position.go_on_from(extra)
            self._run.stepping.load(optimizers, extra["stepping"])
            # Where the earlier run was told to go on; an older dtkit kept none of it.
            self._run.controls.change(0, extra.get("controls", {}))
            self._say(f"resumed from {where}")
        self.resume_from = None
        return path

    def take(self, objects: dict[str, Any], mark: dict[str, Any] | None = None) -> Pending:
        """Begin to write a checkpoint of `objects`, of what was registered, or of what is found.

        Raises:
            CheckpointError: it cannot be begun, on any rank.
        """
        objects = objects or self._given or self._find()
        if not objects:
            msg = "nothing to save: no optimizer has made a step; name what to save"
            raise CheckpointError(msg)
        mark = mark or self._run.position.state()
        if self._run.wire is not None:
            self._run.wire.before_collective()
        if self._run.recipe.is_free:  # a number that all agree on: each has made its own steps
            mark["step"] = max(self._ranks.together(lambda: mark["step"]))
        extra = {
            **mark,
            "stepping": self._run.stepping.state(_optimizers(objects)),
            "controls": dict(self._run.controls.values),
        }
        self._pending = self._writer.save(objects, extra, step=mark["step"], epoch=mark["epoch"])
        return self._pending

    def before_step(self, optimizer: Optimizer) -> None:
        """Remember whose state is wanted; refuse to begin anew what was to be resumed."""
        __tracebackhide__ = True
        if self.resume_from is not None:
            msg = (
                f"--resume {self.resume_from}: nothing has loaded it. Before its loop the cell "
                "must say what is to be loaded: start = dtkit.resume(model=model, "
                "optimizer=optimizer), and begin at start.epoch"
            )
            raise CheckpointError(msg)
        known = self._optimizers.get(id(optimizer))
        if known is None or known() is not optimizer:
            self._optimizers[id(optimizer)] = ref(optimizer)

    def end(self, state: str) -> None:
        """Wait until all are written, unless the cell failed, and say which there are."""
        if self._pending is not None and state != "failed":
            with contextlib.suppress(CheckpointError):  # `_ended` has told it
                self._pending.wait()
        kept = whole(self._folder)
        if kept:
            names = ", ".join(Manifest.read(kept[-1]).names)
            noun = "checkpoint" if len(kept) == 1 else "checkpoints"
            self._say(f"{len(kept)} {noun} of {names} in {self._folder}, newest {kept[-1].name}")

    def _find(self) -> dict[str, Any]:
        live = [optimizer for known in self._optimizers.values() if (optimizer := known())]
        frame = sys._getframe(1)  # noqa: SLF001  the documented way
        found = find_objects(live, current_shell().user_ns, frame, self._names)
        self._names.update((thing, name) for name, thing in found.items())
        return found

    def _ended(self, pending: Pending) -> None:
        if pending.error is None:
            return
        kept = whole(self._folder)
        rest = f"the newest whole one is {kept[-1].name}" if kept else "there is none before it"
        self._say(f"{pending.error}; {rest}. Training goes on, and the next one is tried")

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            self._run.note(text)


def _optimizers(objects: dict[str, Any]) -> dict[str, Optimizer]:
    return {name: thing for name, thing in objects.items() if isinstance(thing, Optimizer)}


class Periodic(Checkpoints):
    """Takes one every so many steps too.

    One that is due after a step is taken when the next batch has come: by then
    the cell's own end of the step, and of the epoch, has been done.

    Args:
        every: steps between two checkpoints.
        options: as of `Checkpoints`.
    """

    def __init__(self, run: ActiveRun, *, every: int, **options: Any) -> None:
        super().__init__(run, **options)
        self._every = every
        self._mark: dict[str, Any] | None = None
        self._is_due = False
        self._num_since = 0
        self._has_read = self._reads = False
        """Whether a batch has come since the last step, and for it."""

    def take(self, objects: dict[str, Any], mark: dict[str, Any] | None = None) -> Pending:
        """Begin to write one; the next is due so many steps later."""
        self._mark, self._is_due, self._num_since = None, False, 0
        return super().take(objects, mark)

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002
        """See whether a checkpoint is due."""
        self._num_since += 1
        self._reads, self._has_read = self._has_read, False
        self._is_due |= self._run.position.step % self._every == 0
        if self._is_due:
            self._mark = self._run.position.state()

    def before_batch(self) -> None:
        """Note the state that a checkpoint shall have: drawing the batch changes it."""
        if self._is_due:
            self._mark = self._run.position.state()

    def saw_batch(self, wait_s: float) -> None:  # noqa: ARG002
        """Take the checkpoint that is due."""
        self._has_read = True
        if self._is_due:
            self._try()

    def before_backward(self) -> None:
        """Take the checkpoint that is due, in a cell that reads no DataLoader."""
        # In one that does, another optimizer may still be to step on the batch, as a GAN's second.
        if self._is_due and not self._reads:
            self._try()

    def end(self, state: str) -> None:
        """Take a last one unless the cell failed."""
        if state != "failed" and self._num_since and (self._given or self._find()):
            self._mark = None
            try:
                self._try()
            except RuntimeError as error:  # another rank failed, and this one was freed
                self._run.note(f"there is no checkpoint of the run's end: {error}")
        super().end(state)

    def _try(self) -> None:
        mark, self._is_due = self._mark, False
        try:
            self.take({}, mark)
        except CheckpointError as error:
            self._say(f"the checkpoint was not written: {error}; training goes on")


def make(run: ActiveRun, *, every: int, keep: int, resume: str) -> Part:
    """Return the checkpoints of a run."""
    if every:
        run.checkpoints = Periodic(run, every=every, keep=keep, resume=resume)
    else:
        run.checkpoints = Checkpoints(run, keep=keep, resume=resume)
    return run.checkpoints
