"""One run on one rank: everything that is set up before the cell and put back after it.

The driver calls `begin` and then sends the cell; the run ends by itself with
the cell, whatever became of it and of the driver.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.engine.agent import agent
from dtkit.engine.autopilot import Autopilot
from dtkit.engine.control import Control, RunStopped
from dtkit.engine.loader import Share, TimedBatches
from dtkit.engine.observe import observing
from dtkit.engine.progress import estimate_iterations
from dtkit.engine.recorder import Recorder
from dtkit.engine.shell import current_shell
from dtkit.events import Note, RankEnded, RankStarted, Total
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from dtkit.engine.agent import Agent
    from dtkit.engine.group import Group

__all__ = ["ActiveRun", "begin", "cancel"]


class ActiveRun:
    """Sees the cell train, and lets recorder, autopilot and control each do their part.

    Args:
        owner: this engine's agent.
        spec: dir, start_unix_s, recipe and ranks, as the driver gives them.
    """

    def __init__(self, owner: Agent, spec: dict[str, Any]) -> None:
        if owner.group is None:
            msg = "this rank is in no process group; see %dist_status"
            raise RuntimeError(msg)
        self._agent = owner
        self._group: Group = owner.group
        self._recipe = Recipe.from_dict(spec["recipe"])
        self._lead: Optimizer | None = None
        self._others: set[int] = set()
        self._num_batches = 0
        self._in_closure = False
        self._has_ended = False
        self._depth = 0
        self.control = Control()
        self.recorder = Recorder(
            self._group.rank,
            self._group.device,
            float(spec["start_unix_s"]),
            Path(spec["dir"]) / f"rank-{self._group.rank}.jsonl",
            owner.send,
        )
        self.autopilot = self._make_autopilot(tuple(spec["ranks"]))
        self._stack = ExitStack()

    def start(self) -> None:
        """Install every hook; the next cell that ends takes them away."""
        shell = current_shell()
        for name in ("custom_exceptions", "CustomTB"):
            self._stack.callback(setattr, shell, name, getattr(shell, name))
        shell.set_custom_exc((RunStopped,), _say_nothing)
        shell.events.register("pre_run_cell", self._before_cell)
        self._stack.callback(shell.events.unregister, "pre_run_cell", self._before_cell)
        shell.events.register("post_run_cell", self._after_cell)
        self._stack.callback(shell.events.unregister, "post_run_cell", self._after_cell)
        self._stack.enter_context(observing(self))
        if self.autopilot:
            self._stack.enter_context(self.autopilot.flying())

    def end(self, state: str) -> None:
        """Put everything back, and send what is left."""
        if self._has_ended:
            return
        self._has_ended = True
        self._agent.run = None
        try:
            self._stack.close()
        finally:
            summary = self.autopilot.summary() if self.autopilot else ""
            if summary and self._group.rank == 0:
                self.note(summary)
            self.recorder.emit(
                RankEnded(self._group.rank, state, self.recorder.num_steps, self.recorder.elapsed_s)
            )
            self.recorder.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the driver, on the control thread."""
        return self.control.answer(request)

    def note(self, text: str) -> None:
        """Tell the user something about this run."""
        self.recorder.emit(Note(self._group.rank, text))

    # What follows is the Sink of `observing`: called as the cell trains.

    def before_backward(self, loss: torch.Tensor) -> float:
        """Record the loss; return what this rank's gradient weighs in the global batch."""
        if not self._in_closure:
            self.control.boundary()
        if self.autopilot:
            self.autopilot.before_backward()
        # An optimizer with a closure evaluates the loss several times in a step;
        # the first is the loss that the step started from.
        if self._in_closure != "seen":
            self.recorder.saw_loss(getattr(loss, "dtkit_unscaled", loss))
            if self._in_closure:
                self._in_closure = "seen"  # type: ignore[assignment]
        return self.autopilot.batch_weight if self.autopilot else 1.0

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Adopt it."""
        if self.autopilot:
            self.autopilot.adopt(optimizer)

    def zeroed(self, optimizer: Optimizer) -> None:
        """Pass the boundary between two steps."""
        if not self._in_closure:
            self.control.boundary()
        if self.autopilot:
            self.autopilot.zeroed(optimizer)

    def before_step(self, optimizer: Optimizer, closure: Any) -> Any:
        """Make the gradients final."""
        self._in_closure = closure is not None
        if self.autopilot is None:
            return closure
        self.autopilot.before_step(optimizer)
        return self.autopilot.shared_closure(closure) if closure else closure

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step and close its record."""
        self._in_closure = False
        if self.autopilot:
            self.autopilot.after_step(optimizer)
        if self._leads(optimizer):
            self.control.stepped()
            self.recorder.stepped(float(optimizer.param_groups[0]["lr"]))
            if self.recorder.num_steps == 1:
                self._estimate_total()

    def step_skipped(self) -> None:
        """Forget the step that the GradScaler skipped."""
        self.recorder.skipped()

    def before_use_of_gradients(self) -> None:
        """Average first: clipping and unscaling look at all gradients."""
        if self.autopilot:
            self.autopilot.flush()

    def iterate(self, loader: DataLoader[Any], original: Callable[..., Any]) -> Iterator[Any]:
        """Return the loader's batches, timed, and divided if it is a training loader."""
        twin = self._twin(loader)
        batches = original(twin or loader)
        sampler = twin.batch_sampler if twin else None

        def shares() -> list[Share]:
            return sampler.shares if sampler else []  # type: ignore[attr-defined]

        return TimedBatches(batches, shares, self.control.boundary, self._saw_batch)

    def num_batches(self, loader: DataLoader[Any], original: Callable[..., int]) -> int:
        """Return the number of batches that this rank will get."""
        return original(self._twin(loader) or loader)

    def _twin(self, loader: DataLoader[Any]) -> DataLoader[Any] | None:
        # Under no_grad the cell evaluates: that must see every sample.
        if self.autopilot is None or not torch.is_grad_enabled():
            return None
        return self.autopilot.loaders.twin(loader)

    def _saw_batch(self, num_samples: int, weight: float, wait_s: float) -> None:
        if torch.is_grad_enabled():
            self._num_batches += 1
            self.recorder.saw_batch(num_samples, wait_s)
            if self.autopilot:
                self.autopilot.batch_weight = weight

    def _leads(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's steps are the run's steps.

        The first one to step leads. Others (a GAN's second one) belong to its
        steps, until one steps twice without it: then the leader is done with.
        """
        if self._lead is optimizer or self._lead is None or id(optimizer) in self._others:
            self._lead = optimizer
            self._others.clear()
            return True
        self._others.add(id(optimizer))
        return False

    def _estimate_total(self) -> None:
        iterations = estimate_iterations(sys._getframe(1))  # noqa: SLF001  the documented way
        if iterations:
            self.recorder.emit(
                Total(self._group.rank, max(1, iterations // max(1, self._num_batches)))
            )

    def _before_cell(self, _info: Any) -> None:
        # A magic such as %%capture runs its body as a cell within the cell.
        self._depth += 1
        if self._depth > 1:
            return
        self._agent.note_parent()
        self.recorder.emit(
            RankStarted(
                self._group.rank, os.getpid(), platform.node(), str(self._group.device),
                time.time(),
            )
        )  # fmt: skip

    def _after_cell(self, result: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        error = getattr(result, "error_in_exec", None) or getattr(result, "error_before_exec", None)
        stopped = isinstance(error, RunStopped)
        self.end("stopped" if stopped else "failed" if error or result is None else "finished")

    def _make_autopilot(self, ranks: tuple[int, ...]) -> Autopilot | None:
        if self._recipe.manual or len(ranks) == 1:
            return None
        group = dist.group.WORLD
        if len(ranks) < self._group.world_size:
            group = dist.new_group(list(ranks), use_local_synchronization=True)
        if group is None:
            msg = "the process group is gone; see %dist_reset"
            raise RuntimeError(msg)
        return Autopilot(
            group,
            is_global_batch=self._recipe.batch == "global",
            note=self.note,
            on_wait=self.recorder.waited,
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


def _say_nothing(*_details: Any, **_options: Any) -> None:
    # The driver knows that it asked to stop: no traceback.
    return None
