"""A new run, with its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.driver.runs.companions import accompany
from dtkit.driver.runs.run import Run
from dtkit.driver.runs.rundir import new_folder, storing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dtkit.options import RunOptions
    from dtkit.recipe import Recipe

__all__ = ["create_run"]


def create_run(
    runs_dir: Path,
    cell: str,
    *,
    recipe: Recipe,
    options: RunOptions,
    ranks: Sequence[int],
    name: str | None = None,
    environment: dict[str, Any] | None = None,
    gather: Callable[[Run], None] | None = None,
) -> Run:
    """Create a run and its folder.

    Args:
        runs_dir: where it gets its folder.
        cell: its source.
        recipe: how it trains.
        options: the others.
        ranks: which take part.
        name: its name; None: the time.
        environment: versions and devices.
        gather: called at its end, before what accompanies it looks into the folder.

    Raises:
        InvalidInputError: the name is no plain file name, or nothing can be written there.
    """
    folder = new_folder(runs_dir, name)
    run = Run(
        folder.name, cell, folder, recipe=recipe, options=options, ranks=ranks,
        environment=environment,
    )  # fmt: skip
    with storing():
        (folder / "cell.py").write_text(cell)
        run.write()
    if gather is not None:
        run.at_end(gather)
    accompany(run)
    return run
