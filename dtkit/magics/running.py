"""The magics that run code on the ranks: a training cell, a script, any cell or expression."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import line_cell_magic, line_magic, magics_class

from dtkit._ranks import parse_ranks
from dtkit.driver.waiting import drive
from dtkit.magics.arguments import usage_errors
from dtkit.magics.base import DtkitMagics, say
from dtkit.magics.cells import (
    always,
    go_on_in_background,
    run_on_ranks,
    serves_clicks,
    train_on_ranks,
    with_header,
)
from dtkit.magics.lines import STOP, options_of, parse_train, recipe_of, split_dist

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.driver.requests import Requests

__all__ = ["DistCellMagics"]


@magics_class
class DistCellMagics(DtkitMagics):
    """Magics that run code on the ranks, and stop it."""

    @line_cell_magic
    @usage_errors
    def dist_train(self, line: str, cell: str | None = None) -> None:
        """Train the cell (or a script) on every rank, with a live dashboard."""
        prepared = self.training(line, cell, is_awaiting=False)
        if prepared is not None:
            drive(*prepared)

    @line_cell_magic
    @usage_errors
    def dist(self, line: str, cell: str | None = None) -> None:
        """Run the cell (or an expression) on all ranks, or on some."""
        steps, requests = self.running(line, cell)
        drive(steps, requests)

    @line_magic
    @usage_errors
    def dist_stop(self, line: str) -> None:
        """Stop the run that is going on, at the next step boundary."""
        args = STOP.parse(line)
        self.session.stop(now=args.now)
        say("stopping now" if args.now else "stopping after the step")

    def training(
        self, line: str, cell: str | None, *, is_awaiting: bool = True
    ) -> tuple[Iterator[None], Requests] | None:
        """Return the steps of a run, and the place for requests; None: it is in the background."""
        args = parse_train(line, is_cell=cell is not None)
        session = self.session
        if cell is None:
            code = _script_call(args.words)
        elif not cell.strip():
            msg = "%%dist_train: the cell is empty; write the training code under the magic's line"
            raise UsageError(msg)
        else:
            code = with_header(f"%%dist_train {line}".rstrip(), cell)
        steps, requests = train_on_ranks(
            session,
            code,
            can_click=always if args.background else serves_clicks(is_awaiting=is_awaiting),
            recipe=recipe_of(args),
            options=options_of(args),
            name=args.name,
            ranks=parse_ranks(args.ranks, session.world_size),
        )
        if not args.background:
            return steps, requests
        go_on_in_background(steps, requests)
        return None

    def running(self, line: str, cell: str | None) -> tuple[Iterator[None], Requests]:
        """Return the steps of a cell, and the place for requests."""
        ranks_text, expression = split_dist(line, is_cell=cell is not None)
        session = self.session
        ranks = parse_ranks(ranks_text, session.world_size)
        code = expression if cell is None else with_header(f"%%dist {line}".rstrip(), cell)
        return run_on_ranks(session, code, ranks)


def _script_call(words: list[str]) -> str:
    path = Path(words[0]).expanduser()
    # Not path.is_file(), which raises for a name that no file can have.
    if not os.path.isfile(path):  # noqa: PTH113
        msg = f"%dist_train {words[0]}: no such file; a cell of code wants two percent signs"
        raise UsageError(msg)
    run = "__import__('dtkit.engine.process.script', fromlist=['run']).run"
    source = f"{run}({str(path.resolve())!r}, {words!r})"
    return f"# %dist_train {shlex.join(words)}\n{source}"
