"""Trials: one cell again and again, each time from the same start, on live engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from dtkit.driver.requests import Requests
from dtkit.errors import DtkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from types import TracebackType

    from dtkit.cluster import Engines
    from dtkit.driver.runs.run import Run
    from dtkit.options import RunOptions
    from dtkit.recipe import Recipe

__all__ = ["Trials"]

_TAKE_TIMEOUT_S = 300.0


class Trials:
    """Keeps the ranks' state within a context, and runs a cell from it as often as is asked.

    Every trial begins with the same names, weights and random numbers, whether the cell makes a
    model or goes on with one; when the context is left all is as it was before. Files that the
    cell writes are not put back.

    Attributes:
        requests: the user's, for all trials together: a stop ends the one that runs, and no
            other begins.
        notes: what the user should know.

    Args:
        engines: the engines.
        training: begins a run, as `Session.training` does.
        cell: the cell's source.
        ranks: where it runs.
    """

    def __init__(
        self,
        engines: Engines,
        training: Callable[..., tuple[Run, Iterator[None]]],
        cell: str,
        ranks: Sequence[int],
    ) -> None:
        self._engines = engines
        self._training = training
        self._cell = cell
        self._ranks = tuple(ranks)
        self._has_state = False
        self.requests: Requests = Requests()
        self.notes: list[str] = []

    def is_stopped(self) -> bool:
        """Return whether the user asked for an end."""
        return self.requests.is_stop

    def __enter__(self) -> Self:
        answers = self._call("take", (self._cell,))
        self._has_state = True
        cursors = sorted({name for answer in answers.values() for name in answer["cursors"]})
        if cursors:
            self.notes.append(
                f"{', '.join(cursors)}: a generator cannot be put back; each trial goes on with "
                "it where the last one left it"
            )
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._has_state and not self._engines.is_closed:
            self._ranks = tuple(rank for rank in self._ranks if rank not in self._engines.lost)
            self._call("drop")

    def run(self, recipe: Recipe, options: RunOptions, name: str) -> Generator[None, None, Run]:
        """Run the cell once; yields while it runs, and returns the run also if it failed.

        Raises:
            DtkitError: the ranks cannot be brought back to the start: no trial can follow.
        """
        run, steps = self._training(
            self._cell, recipe=recipe, options=options, name=name, ranks=self._ranks
        )
        run.requests = self.requests
        try:
            yield from steps
        except DtkitError:
            if run.error is None:
                raise
        finally:
            if not self._engines.is_closed:
                self._call("restore")
        return run

    def _call(self, what: str, args: tuple[Any, ...] = ()) -> dict[int, Any]:
        return self._engines.call(
            f"dtkit.engine.snapshot:{what}", args, ranks=self._ranks, timeout_s=_TAKE_TIMEOUT_S
        )
