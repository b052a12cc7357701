"""One run on one rank: everything that is set up before the cell and put back after it.

The driver calls `begin` and then sends the cell; the run ends by itself with
the cell, whatever became of it and of the driver.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.compression import Compression
from dtkit.engine.accumulate import Accumulation
from dtkit.engine.autopilot import Autopilot
from dtkit.engine.control import Control, RunStopped
from dtkit.engine.livecontrols import LiveControls
from dtkit.engine.observe import observing
from dtkit.engine.parallel.unedited import sharder_of
from dtkit.engine.parts import make_parts
from dtkit.engine.precision import make_precision
from dtkit.engine.process.agent import agent
from dtkit.engine.process.group import subgroup
from dtkit.engine.process.shell import current_shell
from dtkit.engine.recorder import Recorder
from dtkit.engine.reduce import Wire
from dtkit.engine.refusal import or_refuse, readmit
from dtkit.engine.stepping import Stepping
from dtkit.engine.watch import Watch
from dtkit.events import Note, RankStarted
from dtkit.recipe import Recipe
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    import torch.distributed as dist

    from dtkit.engine.checkpointing.part import Checkpoints
    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.parts import Part
    from dtkit.engine.position import Position
    from dtkit.engine.process.agent import Agent
    from dtkit.engine.process.group import Group

__all__ = ["ActiveRun", "begin", "cancel"]


class ActiveRun:
    """Sees the cell train, and lets recorder, autopilot and control each do their part.

    Args:
        owner: this engine's agent.
        spec: dir, start_unix_s, recipe, ranks and parts, as the driver gives them.
    """

    def __init__(self, owner: Agent, spec: dict[str, Any]) -> None:
        if owner.group is None:
            msg = "this rank is in no process group; see %dist_status"
            raise RuntimeError(msg)
        self._agent = owner
        self._group: Group = owner.group
        self.recipe: Recipe = Recipe.from_dict(spec["recipe"])
        self.ranks: tuple[int, ...] = tuple(map(int, spec["ranks"]))
        self.dir: Path = Path(spec["dir"])
        self._has_ended, self._depth = False, 0
        self.start_unix_s: float = float(spec["start_unix_s"])
        self.recorder: Recorder = Recorder(
            self._group.rank,
            self._group.device,
            self.start_unix_s,
            self.dir / f"rank-{self._group.rank}.jsonl",
            owner.send,
            num_ranks=len(self.ranks),
        )
        self.sent: Callable[[float, float], None] = self.recorder.sent
        self._parts: tuple[Part, ...] = ()
        self.group: dist.ProcessGroup | None = subgroup(self._group, self.ranks, spec["dir"])
        self.checkpoints: Checkpoints | None = None
        self.wire: Wire | None = None
        """What gradients travel through, if dtkit averages them."""
        self.autopilot: Autopilot | None = self._make_autopilot()
        self._name = f"dtkit/{self._group.generation}/{spec['dir']}"
        self._parts = make_parts(self, spec["parts"])
        self._precision = make_precision(
            self.recipe.amp, self._group.device, self._note_if_first
        )  # fmt: skip
        self.stepping: Stepping = Stepping(
            Accumulation(self.recipe.accumulate), self._precision, self.autopilot
        )
        self.controls: LiveControls = LiveControls(
            self.recorder, self.stepping.lr, lambda: self._watch.lead
        )
        self.control: Control = Control(self.controls.change)
        self._watch = Watch(self.recorder, self.control, self.autopilot, self.stepping, self._parts)
        self._stack = ExitStack()

    @property
    def rank(self) -> int:
        """This rank, in the whole group."""
        return self._group.rank

    @property
    def host(self) -> str:
        """What this rank's host is called."""
        return self._group.host

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._group.device

    @property
    def backend(self) -> str:
        """Gloo or nccl."""
        return self._group.backend

    @property
    def position(self) -> Position:
        """Where the run is in its data."""
        return self._watch.position

    def start(self) -> None:
        """Install every hook; the next cell that ends takes them away."""
        self.recorder.start()
        shell = current_shell()
        for name in ("custom_exceptions", "CustomTB"):
            self._stack.callback(setattr, shell, name, getattr(shell, name))
        # The driver knows that it asked to stop: no traceback.
        shell.set_custom_exc((RunStopped,), lambda *_details, **_options: None)
        self._stack.callback(readmit)
        shell.events.register("pre_run_cell", self._before_cell)
        self._stack.callback(shell.events.unregister, "pre_run_cell", self._before_cell)
        shell.events.register("post_run_cell", self._after_cell)
        self._stack.callback(shell.events.unregister, "post_run_cell", self._after_cell)
        self._stack.enter_context(observing(self._watch))
        if self.autopilot:
            self._stack.enter_context(self.autopilot.flying())
        if self._precision:
            self._stack.enter_context(self._precision.running())

    def end(self, state: str) -> None:
        """Put everything back, and send what is left."""
        if self._has_ended:
            return
        self._has_ended = True
        self._agent.run = None
        try:
            self.stepping.lr.restore()  # a step that was interrupted has left its factor there
            self._end_parts(state)
            self._stack.close()
        finally:
            if self.autopilot is not None:
                self._agent.drawn = self.autopilot.drawn()
                self._sum_up(self.autopilot, has_failed=state == "failed")
            if self._precision and self._precision.summary():
                self._note_if_first(self._precision.summary())
            lead = self._watch.lead
            summary = {} if lead is None else {"optimizer": type(lead).__name__}
            self.recorder.ended(state, summary)
            self.recorder.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the driver, on the control thread."""
        return self.control.answer(request)

    def note(self, text: str) -> None:
        """Tell the user something about this run."""
        self.recorder.emit(Note(self._group.rank, text))

    def arrange(self, layout: Layout) -> None:
        """Train as a model wants it that several ranks hold together."""
        layout.check_recipe(self.recipe)
        self._counts_for(layout)
        if self.autopilot is not None:
            self.autopilot.arrange(layout)

    def stand_back(self, params: Sequence[torch.Tensor], reason: str) -> None:
        """Leave parameters, and how the cell's data is divided, to whoever distributes them."""
        if self.autopilot is not None:
            self.autopilot.stand_back(params, reason)

    def _counts_for(self, layout: Layout) -> None:
        self.recorder.num_holders = layout.num_holders

    def waited(self, seconds: float) -> None:
        """Note that this rank has waited so long for other ranks' gradients, until now."""
        self.recorder.waited(seconds)
        for part in self._parts:
            part.waited(seconds)

    def _end_parts(self, state: str) -> None:
        for part in self._parts:
            try:
                part.end(state)
            except Exception as error:  # noqa: BLE001  the others must end too: it is told
                self.note(f"{type(part).__name__} failed at the end: {error}")

    def _sum_up(self, autopilot: Autopilot, *, has_failed: bool) -> None:
        if autopilot.summary():
            self._note_if_first(autopilot.summary())
        is_compared = not has_failed and not self.recipe.is_free  # these were just made equal
        if self._watch.lead is not None and is_compared:
            text = autopilot.compare_weights(self._watch.lead, self._group.store, self._name)
            if text:
                self.note(text)

    @or_refuse
    def _before_cell(self, info: Any) -> None:
        # A magic such as %%capture runs its body as a cell within the cell.
        self._depth += 1
        if self._depth > 1:
            return
        source, namespace = getattr(info, "raw_cell", ""), current_shell().user_ns
        if self.autopilot:
            self.autopilot.prepare(source, namespace)
        if self._precision:
            self._precision.prepare(source)
        self.stepping.prepare(namespace)
        for part in self._parts:
            part.begin()
        self.recorder.emit(
            RankStarted(
                self._group.rank, os.getpid(), self.host, str(self._group.device),
                time.time(),
            )
        )  # fmt: skip

    def _after_cell(self, result: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        error = getattr(result, "error_in_exec", None) or getattr(result, "error_before_exec", None)
        stopped = isinstance(error, RunStopped)
        with self._agent.ending_run():
            if error is None and result is not None:
                self._finish_steps()
            self.end("stopped" if stopped else "failed" if error or result is None else "finished")

    def _finish_steps(self) -> None:
        try:
            num = self.stepping.finish()
        except RuntimeError as error:  # another rank failed, and this one waited for it
            self.note(f"the last steps, not yet {self.recipe.accumulate}, are lost: {error}")
            return
        if num:
            self._note_if_first(
                f"the last {num} of {self.recipe.accumulate} accumulated steps were made at the "
                "cell's end, unclipped: no DataLoader said where the data ended"
            )

    def _note_if_first(self, text: str) -> None:
        if self.autopilot is None or self._group.rank == self.autopilot.first_rank:
            self.note(text)

    def _make_autopilot(self) -> Autopilot | None:
        if self.recipe.manual or self.group is None:
            return None
        compression = Compression.parse(self.recipe.compress)
        strategy = Strategy.parse(self.recipe.strategy)
        self.wire = Wire(self.group, compression, self.recorder.sent, strategy)
        return Autopilot(
            self.wire,
            is_global_batch=self.recipe.batch == "global",
            note=self.note,
            on_wait=self.waited,
            on_layout=self._counts_for,
            is_deferred=self.recipe.accumulate > 1,
            sharder=sharder_of(strategy),
        )


def begin(spec: dict[str, Any]) -> None:
    """Begin a run on this rank; the next cell belongs to it."""
    owner = agent()
    if owner.run is not None:
        msg = "a run is active on this rank already"
        raise RuntimeError(msg)
    run = ActiveRun(owner, spec)
    owner.run = run
    try:
        run.start()
    except BaseException:
        run.end("failed")
        raise


def cancel() -> None:
    """Take back a `begin` whose cell will not be sent; harmless without one."""
    run = agent().run
    if isinstance(run, ActiveRun):
        run.end("failed")
