"""Sweep: one cell under several recipes, and what came of each."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from dtkit.errors import DtkitError, InvalidInputError
from dtkit.recipe import Recipe
from dtkit.views.sweeptable import Outcome, compare

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dtkit.driver.runs.run import Run
    from dtkit.driver.trials.trial import Trials
    from dtkit.options import RunOptions

__all__ = ["Sweep", "plan_sweep"]


@dataclass(slots=True)
class SweepRow:
    """One recipe of a sweep.

    Attributes:
        settings: the fields that the sweep varies, with this row's values.
        recipe: the whole recipe; None: it was refused, `error` says why.
        state: waiting, running, finished, stopped, failed or refused.
        error: why it failed or was refused.
        run: its run, once begun.
    """

    settings: dict[str, Any]
    recipe: Recipe | None
    state: str = "waiting"
    error: str = ""
    run: Run | None = None

    @property
    def label(self) -> str:
        """The settings as flags."""
        return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in self.settings.items())


class Sweep:
    """A cell under every combination of some settings; a notebook shows a picture and a table.

    Attributes:
        name: of the sweep; its runs are called `<name>-1` and so on.
        axes: the settings that vary, with their values.
        rows: one for each combination, those that failed and were refused among them.
        notes: what was done, or could not be.
        path: the results as JSON, written anew after every row.
    """

    def __init__(
        self, name: str, axes: Mapping[str, Sequence[Any]], rows: Sequence[SweepRow], path: Path
    ) -> None:
        self.name = name
        self.axes: dict[str, tuple[Any, ...]] = {
            axis: tuple(values) for axis, values in axes.items()
        }
        self.rows: tuple[SweepRow, ...] = tuple(rows)
        self.notes: list[str] = []
        self.path = path

    def outcomes(self) -> list[Outcome]:
        """Return what came of each row, in their order; unknown numbers are NaN."""
        return compare([
            (row.label, row.state, row.error, None if row.run is None else row.run.history,
             float("nan") if row.run is None else row.run.view().peak_gib)
            for row in self.rows
        ])  # fmt: skip

    def to_pandas(self) -> Any:  # Any: pandas is not a dependency
        """Return a DataFrame: one row for each recipe, a column for each setting and number.

        Raises:
            ModuleNotFoundError: pandas is not installed (`pip install pandas`).
        """
        import pandas as pd  # optional dependency

        return pd.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return each row as a flat dictionary: its settings, and what came of it."""
        records = []
        for row, outcome in zip(self.rows, self.outcomes(), strict=True):
            found = asdict(outcome)
            found.pop("label")
            run = "" if row.run is None else row.run.name
            records.append({**row.settings, **found, "run": run})
        return records

    def write(self) -> None:
        """Write the results: whole or not at all."""
        facts = {"name": self.name, "axes": self.axes, "notes": self.notes, "rows": self.records()}
        temporary = self.path.with_suffix(".tmp")
        # NaN is no JSON: unknown numbers are null.
        text = json.dumps(_without_nan(facts), indent=2)
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.path)
        except OSError as error:  # a full disk: the rows are here all the same
            note = f"the results are not all in {self.path.name}: {error}"
            if note not in self.notes:
                self.notes.append(note)

    def run_all(self, trials: Trials, options: RunOptions) -> Iterator[None]:
        """Run every row, one after the other, until all are done or a stop is asked for."""
        with trials:
            self.notes += trials.notes
            for number, row in enumerate(self.rows, start=1):
                if row.recipe is None:
                    continue
                if trials.is_stopped():
                    break
                row.state = "running"
                try:
                    row.run = yield from trials.run(row.recipe, options, f"{self.name}-{number}")
                except DtkitError as error:
                    row.state, row.error = "failed", str(error)
                    self.notes.append(f"the sweep ended here: {error}")
                    break
                finally:
                    self._settle(row)
                    self.write()

    def _settle(self, row: SweepRow) -> None:
        if row.run is not None:
            row.state = row.run.state
            row.error = "" if row.run.error is None else str(row.run.error)
        elif row.state == "running":
            row.state = "stopped"

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        from dtkit.views.sweepview import sweep_bundle  # draws: loads matplotlib

        return sweep_bundle(self.name, self.outcomes(), self._curves(), self.notes)

    def _curves(self) -> list[tuple[str, Any]]:
        return [(row.label, row.run.history) for row in self.rows if row.run is not None]

    def __repr__(self) -> str:
        from dtkit.views.sweepview import sweep_text

        return sweep_text(self.name, self.outcomes(), self.notes)


def plan_sweep(
    axes: Mapping[str, Sequence[Any]], base: Recipe, folder: Path, name: str | None
) -> Sweep:
    """Return the sweep that is to be run: every combination of the axes' values.

    Args:
        axes: fields of `Recipe`, each with the values to try.
        base: what does not vary.
        folder: of the runs.
        name: of the sweep; None: the time.

    Raises:
        InvalidInputError: an axis is no field of a recipe, or there is nothing to vary.
    """
    known = {field.name for field in fields(Recipe)}
    for axis, values in axes.items():
        if axis not in known:
            msg = f"a sweep cannot vary {axis!r}: choose of {', '.join(sorted(known))}"
            raise InvalidInputError(msg)
        if not values:
            msg = f"--{axis.replace('_', '-')}: name at least one value"
            raise InvalidInputError(msg)
    if not axes:
        msg = "name what varies, as in --compress none,fp16 or --batch-size 32,128"
        raise InvalidInputError(msg)
    rows = [
        _planned(dict(zip(axes, values, strict=True)), base)
        for values in itertools.product(*axes.values())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    base_name = name or time.strftime("sweep-%Y%m%d-%H%M%S")
    path, number = folder / f"{base_name}.sweep.json", 1
    while path.exists():
        number += 1
        path = folder / f"{base_name}-{number}.sweep.json"
    return Sweep(path.name.removesuffix(".sweep.json"), axes, rows, path)


def _planned(settings: dict[str, Any], base: Recipe) -> SweepRow:
    try:
        recipe = Recipe(**{**base.to_dict(), **settings})
    except InvalidInputError as error:
        return SweepRow(settings, None, "refused", str(error))
    return SweepRow(settings, recipe)


def _without_nan(value: Any) -> Any:  # Any: JSON
    if isinstance(value, float) and value != value:  # noqa: PLR0124  NaN is not itself
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value
