"""The magics that repair a session: a new group, new engines in the place of lost ones."""

from __future__ import annotations

from IPython.core.magic import line_magic, magics_class

from dtkit._ranks import parse_ranks
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import RANKS_HELP, DtkitMagics, say

__all__ = ["DistRepairMagics"]


@magics_class
class DistRepairMagics(DtkitMagics):
    """Magics that repair what went wrong and keep the rest."""

    @line_magic
    @usage_errors
    def dist_reset(self, line: str) -> None:
        """Build the process group anew; the ranks keep their names."""
        RESET.parse(line)
        self.session.reset_group()
        say("group rebuilt; state kept")

    @line_magic
    @usage_errors
    def dist_restart(self, line: str) -> None:
        """Put new engines in the place of ranks, under the same numbers."""
        args = RESTART.parse(line)
        session = self.session
        ranks = parse_ranks(args.ranks, session.world_size) if args.ranks else None
        say(f"{session.restart(ranks, refill=args.refill)}; group rebuilt")


def _restart() -> Parser:
    parser = Parser("%dist_restart", "Put new engines in the place of ranks; group rebuilt.")
    what = RANKS_HELP.partition(" (")[0]
    parser.add_argument(
        "ranks", nargs="?", metavar="RANKS", help=f"{what} (default: those whose engine has ended)"
    )
    parser.add_argument(
        "--refill", action="store_true",
        help="give them the names and the random state of a healthy rank",
    )  # fmt: skip
    return parser


RESET = Parser("%dist_reset", "Build the process group anew; the ranks keep their names.")
RESTART = _restart()
