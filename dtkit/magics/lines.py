"""What the lines of the magics that run code may say."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from dtkit.compression import METHODS
from dtkit.magics.arguments import Parser
from dtkit.magics.base import RANKS_HELP
from dtkit.options import HVD, ON_NAN, WRITERS, RunOptions
from dtkit.recipe import AMP, Recipe
from dtkit.strategy import STRATEGIES

if TYPE_CHECKING:
    import argparse

__all__ = [
    "DIST",
    "STOP",
    "TRAIN",
    "add_run_arguments",
    "options_of",
    "parse_train",
    "recipe_of",
    "split_dist",
]


def _train() -> Parser:
    parser = Parser("%%dist_train", "Train the cell on every rank, with a live dashboard.")
    add_run_arguments(parser)
    parser.add_argument(
        "--background", action="store_true",
        help="return at once; %%dist_stop ends the run, dtkit.last_run.wait() waits for it",
    )  # fmt: skip
    return parser


def add_run_arguments(parser: Parser) -> None:
    """Add what a run's recipe and options are described with."""
    _add_recipe(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="in place of the written batch size of DataLoaders that train (default: as written)",
    )  # fmt: skip
    parser.add_argument(
        "--debug", action="store_true",
        help="name collectives that do not match on the ranks; the group is built anew for it, "
        "so make DDP models in this cell; each small collective takes some ms more",
    )  # fmt: skip
    parser.add_argument(
        "--hvd", default="auto", choices=HVD,
        help="what `import horovod.torch` gives: Horovod where it is installed (auto), or dtkit's",
    )  # fmt: skip
    parser.add_argument("--manual", action="store_true", help="the cell distributes itself")
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after N steps (default: at its end)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the run and its folder")
    parser.add_argument(
        "--profile", nargs="?", type=int, const=5, default=0, metavar="STEPS",
        help="torch's profiler on all ranks for some steps after warm-up (default: 5); "
        "before a script write --profile=STEPS",
    )  # fmt: skip
    parser.add_argument("--ranks", default="all", metavar="RANKS", help=RANKS_HELP)
    parser.add_argument(
        "--tensorboard", nargs="?", const="", metavar="DIR",
        help="write the run for TensorBoard, into DIR/<name> or the run's own folder; "
        "before a script write --tensorboard=DIR",
    )  # fmt: skip
    parser.add_argument(
        "--tensorboard-graph", action="store_true", help="with the graph of the model"
    )
    parser.add_argument(
        "--timeline", nargs="?", const="", metavar="FILE",
        help="record where the time goes, for %%dist_timeline and as a trace that Chrome and "
        "Perfetto open; before a script write --timeline=FILE",
    )  # fmt: skip
    parser.add_argument(
        "--timeline-mark-cycles", action="store_true", help="mark where each step begins"
    )
    parser.add_argument(
        "--timeline-steps", type=int, default=200, metavar="N",
        help="how many of the last steps it shows (default: 200; 0: the whole run, compressed)",
    )  # fmt: skip
    parser.add_argument(
        "--writers", default="first", choices=WRITERS,
        help="whose SummaryWriter writes: the first rank's (default), or every rank's",
    )  # fmt: skip
    _add_checkpoints(parser.add_argument_group("checkpoints"))
    _add_faults(parser.add_argument_group("faults"))


def _add_faults(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--auto-restart", action="store_true",
        help="when a rank's engine ends, put a new one with a healthy rank's state in its place",
    )  # fmt: skip
    group.add_argument(
        "--on-nan", default="warn", choices=ON_NAN,
        help="what to do when the loss is not finite (default: warn)",
    )  # fmt: skip


def _add_checkpoints(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N",
        help="save model, optimizer and place in the data every N steps, and at the end",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint-keep", type=int, default=3, metavar="K",
        help="how many checkpoints of the run are kept (default: 3)",
    )  # fmt: skip
    group.add_argument(
        "--resume", default="", metavar="RUN",
        help="go on from the newest checkpoint of a run (name, path, or last); the cell says "
        "what to load: start = dtkit.resume(model=model, optimizer=optimizer)",
    )  # fmt: skip


def _add_recipe(parser: Parser) -> None:
    """Add what changes how a cell trains, but `--manual`."""
    parser.add_argument(
        "--accumulate", default=1, type=int, metavar="K",
        help="make one step of every K that the cell writes: a K times larger batch",
    )  # fmt: skip
    parser.add_argument(
        "--amp", default="off", choices=AMP,
        help="precision of forward passes and losses (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", default="rank", choices=("rank", "global"),
        help="what a written batch size means: of each rank (default), or of all together",
    )  # fmt: skip
    parser.add_argument(
        "--compress", default="none", metavar="METHOD",
        help=f"how gradients travel: {', '.join(METHODS)} (topk:0.01, powersgd:4)",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", default="ddp", metavar="STRATEGY",
        help=f"how the ranks come to train one model: {', '.join(STRATEGIES)} (default: ddp)",
    )  # fmt: skip


TRAIN = _train()
STOP = Parser("%dist_stop", "Stop the run that is going on, at the next step boundary.")
STOP.add_argument(
    "--now", action="store_true", help="do not wait for the step's end; the ranks keep their state"
)

DIST = Parser("%%dist", "Run the cell (%dist: an expression) on all ranks, or on some.")
DIST.add_argument("-r", "--ranks", default="all", metavar="RANKS", help=RANKS_HELP)


def parse_train(line: str, *, is_cell: bool) -> argparse.Namespace:
    """Return the arguments of `%%dist_train`, or of `%dist_train` with a script in `words`.

    A script's own arguments come after its name and are not looked at.
    """
    if is_cell:
        return TRAIN.parse(line)
    options, words = _before_script(TRAIN.split(line))
    args = TRAIN.parse(shlex.join(options))
    if not words:
        msg = "%dist_train: name a script, or use %%dist_train to train the cell below it"
        raise UsageError(msg)
    args.words = words
    return args


def _before_script(words: list[str]) -> tuple[list[str], list[str]]:
    takes_value = TRAIN.options_with_value()
    i = 0
    while i < len(words) and words[i].startswith("-"):
        i += 2 if words[i] in takes_value else 1
    return words[:i], words[i:]


def split_dist(line: str, *, is_cell: bool) -> tuple[str, str]:
    """Return the ranks and the expression of a `%dist` line; of a cell only the ranks."""
    words = line.split(maxsplit=2)
    ranks, expression = "all", line.strip()
    if words and words[0] in ("-h", "--help"):
        DIST.parse("-h")
    if words and words[0] in ("-r", "--ranks"):
        if len(words) == 1:
            DIST.error(f"{words[0]} wants {RANKS_HELP}")
        ranks, expression = words[1], words[2] if len(words) > 2 else ""  # noqa: PLR2004
    if is_cell and expression:
        DIST.parse(line)  # says what is wrong with it
    if not is_cell and not expression:
        DIST.error("write an expression, as in %dist torch.cuda.is_available()")
    return ranks, expression


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the arguments of `%%dist_train` describe."""
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def options_of(args: argparse.Namespace) -> RunOptions:
    """Return the run's other options."""
    return RunOptions(**{field.name: getattr(args, field.name) for field in fields(RunOptions)})
