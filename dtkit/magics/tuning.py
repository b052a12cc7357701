"""The magics that run one cell several times: sweeps, and the search of a batch or a rate."""

from __future__ import annotations

import re
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.magic import cell_magic, magics_class

from dtkit._ranks import parse_ranks
from dtkit.driver.trials.tune import TuneSettings
from dtkit.driver.waiting import drive
from dtkit.errors import InvalidInputError
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import RANKS_HELP, DtkitMagics
from dtkit.magics.cells import serves_clicks, with_header
from dtkit.magics.lines import add_run_arguments, options_of
from dtkit.recipe import Recipe
from dtkit.views.trialboard import TrialBoard

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from dtkit.driver.requests import Requests

__all__ = ["DistTuneMagics"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@magics_class
class DistTuneMagics(DtkitMagics):
    """Magics that try a training cell several times, each time from the same start."""

    @cell_magic
    @usage_errors
    def dist_sweep(self, line: str, cell: str) -> None:
        """Train the cell under several recipes, and compare them in a table and a picture."""
        drive(*self.sweeping(line, cell, is_awaiting=False))

    @cell_magic
    @usage_errors
    def dist_tune(self, line: str, cell: str) -> None:
        """Find a batch size or a learning rate for the cell; nothing is changed."""
        drive(*self.tuning(line, cell, is_awaiting=False))

    def sweeping(
        self, line: str, cell: str, *, is_awaiting: bool = True
    ) -> tuple[Iterator[None], Requests]:
        """Return the steps of a sweep, and the place for requests."""
        args = SWEEP.parse(line)
        _check_cell("%%dist_sweep", cell)
        session = self.session
        axes, base = split_axes(args)
        sweep, requests, steps = session.sweeping(
            with_header(f"%%dist_sweep {line}".rstrip(), cell),
            axes,
            recipe=base,
            options=options_of(args),
            name=args.name,
            ranks=parse_ranks(args.ranks, session.world_size),
        )
        return _shown(
            sweep, steps, requests, lambda: _html(sweep), is_awaiting=is_awaiting
        ), requests

    def tuning(
        self, line: str, cell: str, *, is_awaiting: bool = True
    ) -> tuple[Iterator[None], Requests]:
        """Return the steps of a search, and the place for requests."""
        args = TUNE.parse(line)
        _check_cell("%%dist_tune", cell)
        session = self.session
        tuning, requests, steps = session.tuning(
            with_header(f"%%dist_tune {line}".rstrip(), cell),
            args.what,
            settings=TuneSettings(
                num_steps=args.steps,
                first_batch=args.first,
                most_batch=args.most,
                memory_bytes=num_bytes(args.memory),
                low=args.low,
                high=args.high,
            ),
            recipe=Recipe(batch=args.batch, manual=args.manual),
            ranks=parse_ranks(args.ranks, session.world_size),
        )
        return _shown(
            tuning, steps, requests, lambda: _html(tuning), is_awaiting=is_awaiting
        ), requests


def split_axes(args: argparse.Namespace) -> tuple[dict[str, list[Any]], Recipe]:
    """Return the settings with several values, and a recipe of those with one."""
    usual = Recipe()
    axes: dict[str, list[Any]] = {}
    base: dict[str, Any] = {}
    for field in fields(Recipe):
        given = getattr(args, field.name)
        default = getattr(usual, field.name)
        if isinstance(default, bool) or given is None:
            base[field.name] = default if given is None else given
            continue
        is_number = isinstance(default, int) or default is None
        values = [_value(field.name, word, is_number=is_number) for word in given.split(",")]
        if len(values) > 1:
            axes[field.name] = list(dict.fromkeys(values))
        else:
            base[field.name] = values[0]
    if not axes:
        SWEEP.error("give a setting several values, as in --compress none,fp16")
    return axes, Recipe(**base)


def num_bytes(text: str | None) -> int | None:
    """Return a size such as 500M or 2G in bytes.

    Raises:
        InvalidInputError: it is no size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if found is None:
        msg = f"--memory {text}: write a size such as 500M or 2G"
        raise InvalidInputError(msg)
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _value(name: str, word: str, *, is_number: bool) -> Any:
    if not is_number:
        return word.strip()
    try:
        return int(word)
    except ValueError:
        SWEEP.error(f"--{name.replace('_', '-')} {word}: whole numbers, as in 32,128")


def _check_cell(magic: str, cell: str) -> None:
    if not cell.strip():
        msg = f"{magic}: the cell is empty; write the training code under the magic's line"
        raise InvalidInputError(msg)


def _html(shown: Any) -> str:
    return f"<pre>{escape(repr(shown))}</pre>"


def _shown(
    result: Any,
    steps: Iterator[None],
    requests: Requests,
    html: Callable[[], str],
    *,
    is_awaiting: bool,
) -> Iterator[None]:
    can_click = serves_clicks(is_awaiting=is_awaiting) or (lambda: False)
    board = TrialBoard(requests.stop, can_click=can_click)
    try:
        for _ in steps:
            board.refresh(html)
            yield
    finally:
        board.finish(result)


def _sweep() -> Parser:
    parser = Parser(
        "%%dist_sweep",
        "Train the cell under every combination of settings that have several values "
        "(--compress none,fp16 --batch-size 32,128), each from the same start.",
    )
    add_run_arguments(parser)
    names = {field.name for field in fields(Recipe)}
    for action in parser.actions:
        if action.dest in names and action.nargs != 0:
            # One value or several; Recipe checks each.
            action.type = action.choices = action.default = None
    return parser


def _tune() -> Parser:
    parser = Parser(
        "%%dist_tune",
        "Find a batch size (batch) or a learning rate (lr) for the cell; it is tried for some "
        "steps at a time, and everything is put back afterwards.",
    )
    settings = TuneSettings()
    parser.add_argument("what", choices=("batch", "lr"), help="what to look for")
    parser.add_argument(
        "--batch", default="rank", choices=("rank", "global"),
        help="what a batch size means: of each rank (default), or of all together",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of each trial (default: 12; lr: 100 in all)"
    )
    parser.add_argument(
        "--from", dest="first", type=int, default=settings.first_batch, metavar="N",
        help="the first batch to try (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--most", type=int, default=settings.most_batch, metavar="N",
        help="the largest batch to try (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE",
        help="on CPU, what a rank may take beside what it has, such as 2G (default: 80 %% of "
        "what is free, over all ranks)",
    )  # fmt: skip
    parser.add_argument(
        "--low", type=float, default=settings.low, metavar="LR",
        help="lr: the first one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--high", type=float, default=settings.high, metavar="LR",
        help="lr: the last one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--manual", action="store_true", help="the cell distributes itself")
    parser.add_argument("--ranks", default="all", metavar="RANKS", help=RANKS_HELP)
    return parser


SWEEP = _sweep()
TUNE = _tune()
