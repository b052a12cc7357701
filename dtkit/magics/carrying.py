"""The magics that carry objects between the notebook and the ranks."""

from __future__ import annotations

from IPython.core.error import UsageError
from IPython.core.magic import line_magic, magics_class

from dtkit._ranks import parse_ranks
from dtkit.errors import InvalidInputError, did_you_mean
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import RANKS_HELP, DtkitMagics, say

__all__ = ["DistObjectMagics"]


@magics_class
class DistObjectMagics(DtkitMagics):
    """Magics that push, pull and compare."""

    @line_magic
    @usage_errors
    def dist_push(self, line: str) -> None:
        """Copy objects from the notebook to the ranks."""
        args = PUSH.parse(line)
        missing = [name for name in args.names if name not in self.names]
        if missing:
            hint = did_you_mean(missing[0], self.names)
            msg = f"%dist_push: no {', '.join(missing)} in the notebook"
            raise UsageError(f"{msg}; {hint}" if hint else msg)
        session = self.session
        ranks = parse_ranks(args.ranks, session.world_size)
        for sent in session.push({n: self.names[n] for n in args.names}, ranks=ranks):
            say(str(sent))

    @line_magic
    @usage_errors
    def dist_pull(self, line: str) -> None:
        """Copy objects from a rank to the notebook; tensors and modules arrive on the CPU."""
        args = PULL.parse(line)
        if args.new_name and len(args.names) > 1:
            msg = "%dist_pull: --as names one object; pull the others by themselves"
            raise UsageError(msg)
        session = self.session
        rank = _one_rank(args.rank, session.world_size)
        for name in args.names:
            pulled = session.pull(name, rank=rank)
            self.names[args.new_name or name.rpartition(".")[2]] = pulled.value
            say(str(pulled))

    @line_magic
    @usage_errors
    def dist_check(self, line: str) -> None:
        """Compare models, optimizers, random numbers and data shares over the ranks."""
        say(str(self.session.check(CHECK.parse(line).names)))


def _one_rank(text: str, world_size: int) -> int:
    ranks = parse_ranks(text, world_size)
    if len(ranks) != 1:
        msg = f"--rank {text}: name one rank, 0 to {world_size - 1}"
        raise InvalidInputError(msg)
    return ranks[0]


def _push() -> Parser:
    parser = Parser("%dist_push", "Copy objects from the notebook to the ranks.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("-r", "--ranks", default="all", metavar="RANKS", help=RANKS_HELP)
    return parser


def _pull() -> Parser:
    parser = Parser("%dist_pull", "Copy objects from a rank to the notebook.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--rank", default="0", metavar="R", help="which rank's (default: 0)")
    parser.add_argument("--as", dest="new_name", metavar="NEW", help="its name in the notebook")
    return parser


def _check() -> Parser:
    parser = Parser(
        "%dist_check",
        "Compare parameters, buffers, optimizers, random numbers and data shares over the ranks.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="models, optimizers, tensors, or what has a state_dict (default: all models, "
        "optimizers and divided loaders)",
    )  # fmt: skip
    return parser


CHECK = _check()
PUSH = _push()
PULL = _pull()
