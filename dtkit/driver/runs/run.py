"""Run: one execution of `%%dist_train`, while it lasts and ever after."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.driver.requests import Requests
from dtkit.driver.runs.asked import ask
from dtkit.driver.runs.celloutput import CellOutput
from dtkit.driver.runs.rundir import write_facts
from dtkit.errors import DtkitError, InvalidInputError
from dtkit.events import OVER, Note
from dtkit.livecontrol import settings
from dtkit.telemetry import RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.driver.runs.timeline import OperatorTable, Timeline
    from dtkit.events import Event
    from dtkit.livecontrol import LiveControl, Value
    from dtkit.options import RunOptions
    from dtkit.recipe import Recipe
    from dtkit.telemetry import ControlChange, Curve, History, News, RunView

__all__ = ["Run"]

_SHOWN_TIMEOUT_S = 5.0


class Run:
    """One execution of a training cell.

    Attributes:
        name: as given with `--name`, or the time it started.
        recipe: the flags that changed how it trained.
        options: the others.
        ranks: the ranks that took part.
        environment: versions and devices that it ran with.
        cell: the cell's source.
        dir: folder with `run.json`, `cell.py` and one `rank-<R>.jsonl` of events per rank.
        error: what it failed with, else None.
    """

    def __init__(
        self,
        name: str,
        cell: str,
        folder: Path,
        *,
        recipe: Recipe,
        options: RunOptions,
        ranks: Sequence[int],
        environment: dict[str, Any] | None = None,
        start_unix_s: float | None = None,
    ) -> None:
        self.name = name
        self.cell = cell
        self.recipe = recipe
        self.options = options
        self.ranks: tuple[int, ...] = tuple(ranks)
        self.environment: dict[str, Any] = environment or {}
        self.dir = folder
        self.error: BaseException | None = None
        self.start_unix_s: float = time.time() if start_unix_s is None else start_unix_s
        self._state = RunState(name, ranks, str(recipe), self.start_unix_s, is_free=recipe.is_free)
        self.output: CellOutput = CellOutput(ranks, self._state.handle)
        self.requests: Requests = Requests()
        self._final: dict[str, object] | None = None
        self._ended = threading.Event()
        self.shown: threading.Event = threading.Event()
        """Cleared by whoever shows the run, until that is done; `wait` waits for it."""
        self.shown.set()
        self._at_end: list[Callable[[Run], None]] = []
        self.driven: str = "here"
        """Or, if it was read back while it went on, elsewhere or by nobody."""

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run back from its folder, also one of an earlier kernel.

        Raises:
            InvalidInputError: the folder holds no run.
        """
        from dtkit.driver.runs.archive import load  # it makes runs, so it imports this module

        return load(folder)

    @property
    def state(self) -> str:
        """One of running, finished, stopped and failed."""
        state = self._state.state
        return state if state in OVER else "running"

    @property
    def end_unix_s(self) -> float:
        """When it ended, seconds since the epoch; of a run that goes on, now."""
        return self.start_unix_s + self._state.view().elapsed_s

    @property
    def history(self) -> History:
        """The curve so far: columns `step`, `time_s`, `loss`, `samples_per_s` and more."""
        return self._state.history()

    @property
    def summaries(self) -> tuple[dict[str, Any], ...]:
        """What each rank said of itself at its end, so far; JSON values."""
        return self._state.summaries

    @property
    def notes(self) -> tuple[str, ...]:
        """What dtkit did to the cell, or left alone and why."""
        return self._state.view().notes

    def view(self) -> RunView:
        """Return the run as it is now, for a renderer."""
        return self._state.view()

    def curves(self) -> dict[str, Curve]:
        """Return what can be drawn of the run so far, by its name."""
        return self._state.curves()

    @property
    def controls(self) -> dict[str, LiveControl]:
        """The live controls that it has: `lr_factor`, and those that its cell has asked for."""
        return self._state.controls

    @property
    def changes(self) -> tuple[ControlChange, ...]:
        """What was changed of them while it went on, in order."""
        return self._state.view().changes

    def set_controls(self, **values: Value) -> None:
        """Ask for new values of live controls, on all ranks from the same step on.

        Returns at once; `changes` has them when they were made. With `async` and `gossip`
        each rank takes them at a step of its own.

        Args:
            values: by control. `lr` makes that the first learning rate of the next step, by
                way of `lr_factor`, unless the cell has a control of that name.

        Raises:
            InvalidInputError: the run is over, has no such control, or that takes no such value.
        """
        if self.state != "running":
            msg = f"run {self.name!r} has ended ({self.state}): nothing of it can be changed"
            raise InvalidInputError(msg)
        if not values:
            msg = f"nothing to change: name a control, one of {', '.join(self.controls)}"
            raise InvalidInputError(msg)
        checked = settings(self.controls, values)
        if self.driven == "by nobody":
            msg = f"no kernel drives run {self.name!r}: %dist_init --attach takes it over first"
            raise InvalidInputError(msg)
        if self.driven == "elsewhere":
            ask(self.dir, checked)
        else:
            self.requests.change(checked)

    def stop(self) -> None:
        """Ask every rank to stop after its current step."""
        self.requests.stop()

    def wait(self, *, timeout_s: float | None = None) -> None:
        """Wait for the end of a run in the background.

        Args:
            timeout_s: for how long; None waits for ever.

        Raises:
            TimeoutError: the run goes on.
            RankError: the run failed.
        """
        if not self._ended.wait(timeout_s):
            msg = f"run {self.name!r} goes on after {timeout_s:g} s"
            raise TimeoutError(msg)
        self.shown.wait(_SHOWN_TIMEOUT_S)
        if self.error is not None:
            raise self.error

    def watching(self) -> Iterator[None]:
        """Yield until the run has ended; somebody else sees it through."""
        while not self._ended.is_set():
            yield

    def pause(self, is_paused: bool = True) -> None:  # noqa: FBT001, FBT002  reads well
        """Ask every rank to pause after its current step, or to go on."""
        self.requests.pause(is_paused)

    def news(self, first_row: int, low: int, high: int | None) -> News:
        """Return what is new for one that follows the run; see `RunState.news`."""
        return self._state.news(first_row, low, high)

    def at_end(self, follow: Callable[[Run], None]) -> None:
        """Call `follow` with the run when it ends, before its last facts are written."""
        self._at_end.append(follow)

    def write_tensorboard(self, folder: str | Path | None = None) -> Path:
        """Write the run as TensorBoard's event files, also one that was read back.

        Args:
            folder: gets them; None: `tensorboard` in the run's own folder.
        """
        from dtkit.driver.runs.companions import write_tensorboard  # loads TensorBoard

        target = self.dir / "tensorboard" if folder is None else Path(folder)
        write_tensorboard(self, target)
        return target

    def timeline(self) -> Timeline:
        """Return where the run's time went, and what to do about it.

        Raises:
            InvalidInputError: no timeline was recorded (`--timeline`).
        """
        from dtkit.driver.runs.timeline import Timeline

        return Timeline(self)

    def operators(self) -> OperatorTable:
        """Return what each operator took on each rank.

        Raises:
            InvalidInputError: the run was not profiled (`--profile`).
        """
        from dtkit.driver.runs.timeline import operators_of

        return operators_of(self)

    def note(self, text: str) -> None:
        """Add a line to what the summary says was done or left alone."""
        self._state.handle(Note(self.ranks[0], text))

    def set_state(self, state: str) -> None:
        """Note what the driver is doing to the run (running, pausing, paused, stopping)."""
        if self._state.state in ("running", "pausing", "paused"):
            self._state.state = state

    def pace(self) -> tuple[float, float]:
        """Return how long no step has ended, in seconds, and the median step, in ms."""
        return self._state.pace()

    def set_stall(self, text: str) -> None:
        """Note why no step has ended for long; empty: steps go on."""
        self._state.stall = text

    def replay(self, event: Event) -> None:
        """Take an event that was read back from disk."""
        self._state.handle(event)

    def replay_end(self, state: str, error: str | None, end_unix_s: float) -> None:
        """Close a run that was read back; nothing is written."""
        self.error = DtkitError(error) if error else None
        self._state.end(state, error, end_unix_s)
        self._ended.set()

    def end(self, state: str, error: BaseException | None = None) -> None:
        """Close the run and write its last facts to its folder."""
        self.error = error
        self._state.end(state, str(error) if error else None)
        for follow in self._at_end:
            try:
                follow(self)
            except Exception as failure:  # noqa: BLE001  the run has ended all the same: it is told
                self.note(f"{failure} ({type(failure).__name__})")
        try:
            self.write()
        except OSError as failure:  # a full disk: what was trained is not lost for that
            self.note(f"how the run ended is not in its folder: {failure}")
        self._ended.set()

    def write(self) -> None:
        """Write `run.json`: whole or not at all."""
        write_facts(self)

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, object]:
        from dtkit.views.summary import summary_bundle  # loads matplotlib: only when shown

        if self.state == "running":
            return summary_bundle(self.view(), self.output.blocks())
        if self._final is None:
            self._final = summary_bundle(self.view(), self.output.blocks(), self.curves())
        return self._final

    def __repr__(self) -> str:
        view = self._state.view()
        loss = "" if math.isnan(view.loss) else f", loss {view.loss:.4g}"
        return f"Run({self.name!r}, {self.state}, {view.step} steps{loss})"
