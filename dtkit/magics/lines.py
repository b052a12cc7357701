"""What each magic's line may say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from dtkit.magics.arguments import Parser

if TYPE_CHECKING:
    import argparse

    from dtkit.session import Session

__all__ = [
    "INIT",
    "PULL",
    "PUSH",
    "SHUTDOWN",
    "STATUS",
    "STOP",
    "TRAIN",
    "parse_train",
    "split_dist",
    "started_line",
]

_RANKS = "ranks such as 0, 0,2 or 1:3 (default: all)"


def _init() -> Parser:
    parser = Parser("%dist_init", "Start one engine per device, with a process group across them.")
    parser.add_argument(
        "-n",
        type=int,
        metavar="N",
        help="number of ranks (default: one per GPU; CPU: cores, up to 4)",
    )
    parser.add_argument("--devices", metavar="LIST", help="GPUs such as 0,1; or cpu")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "nccl", "gloo"),
        help="how ranks communicate (default: nccl where each has a GPU, else gloo)",
    )  # fmt: skip
    parser.add_argument(
        "--oversubscribe", action="store_true", help="let ranks share a GPU (over gloo)"
    )
    return parser


def _train() -> Parser:
    parser = Parser("%%dist_train", "Train the cell on every rank, with a live dashboard.")
    parser.add_argument(
        "--batch", default="rank", choices=("rank", "global"),
        help="what a written batch size means: of each rank (default), or of all together",
    )  # fmt: skip
    parser.add_argument(
        "--background", action="store_true",
        help="return at once; %%dist_stop ends the run, dtkit.last_run.wait() waits for it",
    )  # fmt: skip
    parser.add_argument("--manual", action="store_true", help="the cell distributes itself")
    parser.add_argument("--name", metavar="NAME", help="name of the run and its folder")
    parser.add_argument("--ranks", default="all", metavar="RANKS", help=_RANKS)
    return parser


def _push() -> Parser:
    parser = Parser("%dist_push", "Copy objects from the notebook to the ranks.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("-r", "--ranks", default="all", metavar="RANKS", help=_RANKS)
    return parser


def _pull() -> Parser:
    parser = Parser("%dist_pull", "Copy objects from a rank to the notebook.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--rank", default="0", metavar="R", help="which rank's (default: 0)")
    parser.add_argument("--as", dest="new_name", metavar="NEW", help="its name in the notebook")
    return parser


INIT = _init()
TRAIN = _train()
PUSH = _push()
PULL = _pull()
STATUS = Parser("%dist_status", "Show every rank: device, memory, state.")
STOP = Parser("%dist_stop", "Stop the run that is going on, at the next step boundary.")
SHUTDOWN = Parser("%dist_shutdown", "End the engines; names that live on the ranks are lost.")


def parse_train(line: str, *, is_cell: bool) -> argparse.Namespace:
    """Return the arguments of `%%dist_train`, or of `%dist_train` with a script in `words`.

    A script's own arguments come after its name and are not looked at.
    """
    if is_cell:
        return TRAIN.parse(line)
    options, words = _before_script(line.split())
    args = TRAIN.parse(" ".join(options))
    if not words:
        msg = "%dist_train: name a script, or use %%dist_train to train the cell below it"
        raise UsageError(msg)
    args.words = words
    return args


def _before_script(words: list[str]) -> tuple[list[str], list[str]]:
    takes_value = {"--batch", "--name", "--ranks"}
    i = 0
    while i < len(words) and words[i].startswith("-"):
        i += 2 if words[i] in takes_value else 1
    return words[:i], words[i:]


def split_dist(line: str, *, is_cell: bool) -> tuple[str, str]:
    """Return the ranks and the expression of a `%dist` line; of a cell only the ranks."""
    words = line.split(maxsplit=2)
    ranks, expression = "all", line.strip()
    if words and words[0] in ("-h", "--help"):
        _dist_parser().parse("-h")
    if words and words[0] in ("-r", "--ranks"):
        if len(words) == 1:
            _dist_parser().error(f"{words[0]} wants {_RANKS}")
        ranks, expression = words[1], words[2] if len(words) > 2 else ""  # noqa: PLR2004
    if is_cell and expression:
        _dist_parser().parse(line)  # says what is wrong with it
    if not is_cell and not expression:
        _dist_parser().error("write an expression, as in %dist torch.cuda.is_available()")
    return ranks, expression


def _dist_parser() -> Parser:
    parser = Parser("%%dist", "Run the cell (%dist: an expression) on all ranks, or on some.")
    parser.add_argument("-r", "--ranks", default="all", metavar="RANKS", help=_RANKS)
    return parser


def started_line(session: Session) -> str:
    """Return the one line that `%dist_init` leaves."""
    facts = session.facts[0]
    devices = sorted({fact["device_name"] for fact in session.facts.values()})
    return (
        f"{session} · {', '.join(devices)} · torch {facts['torch']} · Python {facts['python']} "
        f"· {session.start_s:.1f} s"
    )
