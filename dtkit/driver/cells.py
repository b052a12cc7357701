"""CellVerbs: what a session does with cells: run one, train one, try one several times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.driver.core import SessionCore
from dtkit.driver.registry import Registry
from dtkit.driver.requests import Requests
from dtkit.driver.runs.celloutput import CellOutput
from dtkit.driver.runs.create import create_run
from dtkit.driver.trials.advice import METHODS, advise
from dtkit.driver.trials.sweep import Sweep, plan_sweep
from dtkit.driver.trials.trial import Trials
from dtkit.driver.trials.tune import BatchTuning, LrTuning, TuneSettings
from dtkit.driver.waiting import drive
from dtkit.errors import InvalidInputError
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dtkit.driver.runs.run import Run


__all__ = ["CellVerbs"]


class CellVerbs(SessionCore):
    """The verbs of a `Session` that take a cell."""

    def running(
        self, cell: str, *, ranks: Sequence[int] | None = None
    ) -> tuple[CellOutput, Requests, Iterator[None]]:
        """Send a cell to ranks, without a run.

        Returns:
            What it shows, a place for requests, and an iterator to be exhausted:
            it yields while the cell runs, and raises `RankError` if it fails.
        """
        chosen = self.ranks if ranks is None else tuple(ranks)
        output, requests = CellOutput(chosen), Requests()
        return output, requests, self._conductor.run(cell, chosen, output, requests)

    def training(
        self,
        cell: str,
        *,
        recipe: Recipe | None = None,
        options: RunOptions | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> tuple[Run, Iterator[None]]:
        """Send a training cell to ranks.

        Returns:
            The run, and an iterator to be exhausted: it yields while the run
            goes on, and raises `RankError` if it fails.
        """
        chosen = self.ranks if ranks is None else tuple(ranks)
        self._check_open()
        self._conductor.check_idle()
        (recipe or Recipe()).check(options or RunOptions())
        run = create_run(
            self.runs_dir,
            cell,
            recipe=recipe or Recipe(),
            options=(options or RunOptions()).located(self.runs_dir),
            ranks=chosen,
            name=name,
            environment=self.environment(),
            gather=lambda ended: self._cluster.bring_files(ended.dir),
        )
        run.at_end(lambda ended: advise(ended, lambda: self._probe(chosen)))
        Registry.run = run
        return run, self._conductor.train(run)

    def train(
        self,
        cell: str,
        *,
        recipe: Recipe | None = None,
        options: RunOptions | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> Run:
        """Train a cell on the ranks, wait for its end, and return the run; no dashboard.

        Raises:
            RankError: the cell failed on a rank.
        """
        run, steps = self.training(cell, recipe=recipe, options=options, name=name, ranks=ranks)
        drive(steps, run.requests)
        return run

    def sweeping(
        self,
        cell: str,
        axes: Mapping[str, Sequence[Any]],
        *,
        recipe: Recipe | None = None,
        options: RunOptions | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> tuple[Sweep, Requests, Iterator[None]]:
        """Train a cell under every combination of some settings, each from the same start.

        Returns:
            The sweep, a place for requests, and an iterator to be exhausted.
        """
        sweep = plan_sweep(axes, recipe or Recipe(), self.runs_dir, name)
        trials = self._trials(cell, ranks)
        Registry.sweep = sweep
        return sweep, trials.requests, sweep.run_all(trials, options or RunOptions())

    def sweep(
        self,
        cell: str,
        axes: Mapping[str, Sequence[Any]],
        *,
        recipe: Recipe | None = None,
        options: RunOptions | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> Sweep:
        """Train a cell under every combination of some settings, and return what came of each.

        All names on the ranks are afterwards as they were before.

        Args:
            cell: its source.
            axes: fields of `Recipe` with the values to try, as in `{"batch_size": [32, 128]}`.
            recipe: what does not vary.
            options: of every run.
            name: of the sweep.
            ranks: where it trains.

        Raises:
            InvalidInputError: an axis is no field of `Recipe`.
        """
        sweep, requests, steps = self.sweeping(
            cell, axes, recipe=recipe, options=options, name=name, ranks=ranks
        )
        drive(steps, requests)
        return sweep

    def tuning(
        self,
        cell: str,
        what: str = "batch",
        *,
        settings: TuneSettings | None = None,
        recipe: Recipe | None = None,
        ranks: Sequence[int] | None = None,
    ) -> tuple[BatchTuning | LrTuning, Requests, Iterator[None]]:
        """Search a batch size or a learning rate for a cell; see `tune`.

        Returns:
            What is found, a place for requests, and an iterator to be exhausted.
        """
        kinds: dict[str, type[BatchTuning | LrTuning]]
        kinds = {"batch": BatchTuning, "lr": LrTuning}
        if what not in kinds:
            msg = f"there is no tuning of {what!r}: choose one of {', '.join(kinds)}"
            raise InvalidInputError(msg)
        trials = self._trials(cell, ranks)
        tuning = kinds[what](recipe or Recipe(), settings or TuneSettings())
        Registry.tuning = tuning
        return tuning, trials.requests, tuning.search(trials)

    def tune(
        self,
        cell: str,
        what: str = "batch",
        *,
        settings: TuneSettings | None = None,
        recipe: Recipe | None = None,
        ranks: Sequence[int] | None = None,
    ) -> BatchTuning | LrTuning:
        """Find out which batch sizes or learning rates suit a cell; nothing is changed.

        `batch` finds the largest that fits on all ranks and the smallest that is nearly as fast
        as any; `lr` goes once through a range of learning rates. The ranks' names are
        afterwards as they were before.
        """
        tuning, requests, steps = self.tuning(
            cell, what, settings=settings, recipe=recipe, ranks=ranks
        )
        drive(steps, requests)
        return tuning

    def _probe(self, ranks: tuple[int, ...]) -> dict[str, Any]:
        """Return what the link between ranks carries, as rank 0 measured it."""
        arguments = (ranks, tuple(METHODS))
        answers = self._engines.call("dtkit.engine.probe:measure", arguments, ranks=ranks)
        return dict(answers[ranks[0]])

    def _trials(self, cell: str, ranks: Sequence[int] | None) -> Trials:
        self._check_open()
        self._conductor.check_idle()
        chosen = self.ranks if ranks is None else tuple(ranks)
        return Trials(self._engines, self.training, cell, chosen)

    def execute(self, cell: str, *, ranks: Sequence[int] | None = None) -> CellOutput:
        """Run a cell on the ranks, wait for its end, and return what it showed.

        Raises:
            RankError: the cell failed on a rank.
        """
        output, requests, steps = self.running(cell, ranks=ranks)
        drive(steps, requests)
        return output
