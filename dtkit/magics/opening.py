"""The session's magics: start engines, look at them, end them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import line_magic, magics_class
from IPython.display import display
from traitlets import Unicode

from dtkit.driver.registry import current_session
from dtkit.driver.session import Session
from dtkit.driver.waiting import Interrupted
from dtkit.launch import ENGINES, Launch, parse_hosts
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.attaching import attach, note_orphans, started_line
from dtkit.magics.base import DtkitMagics, say
from dtkit.magics.tables import LinkTable, PlaceTable, StageLine, StatusTable
from dtkit.values import DEFAULT_LEASE, Lease

if TYPE_CHECKING:
    import argparse

__all__ = ["DistMagics"]


@magics_class
class DistMagics(DtkitMagics):
    """Magics about the session as a whole; `%config DistMagics` lists what can be set."""

    runs_dir: Unicode[str, str | bytes] = Unicode(
        "dtkit_runs", help="Folder in which every run gets a folder of its own."
    ).tag(config=True)

    @line_magic
    @usage_errors
    def dist_init(self, line: str) -> None:
        """Start one engine per device, with a process group across them."""
        args = parse_init(line)
        session = current_session()
        if args.attach is not None:
            attach(session, args.attach or None)
            return
        if args.check:
            _check(args)
            return
        if session is not None:
            _describe_running(session, args.n)
            return
        stage = StageLine("starting")
        try:
            session = self._start(args, stage)
        except KeyboardInterrupt:
            stage.finish("not started")
            msg = "no engine was started"
            raise Interrupted(msg) from None
        except BaseException:
            stage.finish("not started")
            raise
        stage.finish(started_line(session))
        for warning in session.warnings:
            say(warning)
        note_orphans()

    @line_magic
    @usage_errors
    def dist_status(self, line: str) -> StatusTable:
        """Show every rank: device, memory, state."""
        STATUS.parse(line)
        return StatusTable(str(self.session), self.session.status())

    @line_magic
    @usage_errors
    def dist_where(self, line: str) -> PlaceTable:
        """Show where every rank is now: its cell line, and what it does or waits for."""
        WHERE.parse(line)
        return PlaceTable(self.session.where())

    @line_magic
    @usage_errors
    def dist_shutdown(self, line: str) -> None:
        """End the engines; names that live on the ranks are lost."""
        SHUTDOWN.parse(line)
        session = current_session()
        if session is None:
            say("nothing is running")
            return
        session.close()
        say(f"ended: {session}")

    def _start(self, args: argparse.Namespace, stage: StageLine) -> Session:
        return Session.start(
            args.n,
            launch=args.launch,
            devices=args.devices,
            backend=args.backend,
            oversubscribe=args.oversubscribe,
            runs_dir=self.runs_dir,
            lease=args.lease,
            is_debug=args.debug,
            on_stage=stage.show,
        )


def _check(args: argparse.Namespace) -> None:
    stage = StageLine("checking")
    try:
        found = Session.check_hosts(args.launch, on_stage=stage.show)
    except BaseException:
        stage.finish("not checked")
        raise
    words = [*found.problems, *found.warnings]
    fine = "these hosts can train together" if found.links else "this host can be used"
    stage.finish("\n".join(words) if words else fine)
    if found.links:
        display(LinkTable(found.links))


def _describe_running(session: Session, num_ranks: int | None) -> None:
    if num_ranks not in (None, session.world_size):
        msg = (
            f"%dist_init -n {num_ranks}: {session} are running; "
            f"to change, run %dist_shutdown and then %dist_init -n {num_ranks}"
        )
        raise UsageError(msg)
    say(f"running: {session}; nothing was changed")


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
    _add_launch(parser)
    parser.add_argument(
        "--debug",
        action="store_true",
        help="name collectives that do not match on the ranks; slower (also for a single run)",
    )
    parser.add_argument(
        "--lease", type=float, default=DEFAULT_LEASE.minutes, metavar="MINUTES",
        help="how long the engines live on, idle, when this kernel is gone (default: 15)",
    )  # fmt: skip
    parser.add_argument(
        "--strict-lease", action="store_true", help="count the lease during a run as well"
    )
    parser.add_argument(
        "--attach", nargs="?", const="", metavar="ID",
        help="take over the session that an earlier kernel left, and show its run",
    )  # fmt: skip
    return parser


def _add_launch(parser: Parser) -> None:
    parser.add_argument(
        "--engines", default="local", choices=ENGINES,
        help="through what engines are started: on this host, over ssh or mpirun on --hosts, as "
        "a Slurm job, or as a --profile says (default: local)",
    )  # fmt: skip
    parser.add_argument(
        "--hosts", metavar="NAME:N,…", default="",
        help="hosts and how many ranks each takes, such as alpha:4,beta:4",
    )  # fmt: skip
    parser.add_argument(
        "--interface", metavar="NAME", default="",
        help="through which hosts reach each other (default: the one that leads to them)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="only look whether the hosts can train together, and how fast they reach each other",
    )  # fmt: skip
    parser.add_argument(
        "--python", metavar="PATH", default="",
        help="the interpreter on the hosts (default: at the same path as here)",
    )  # fmt: skip
    parser.add_argument(
        "--ssh", metavar="OPTIONS", default="",
        help='further options for ssh and scp, in quotes, such as "-F FILE"',
    )  # fmt: skip

    parser.add_argument(
        "--mpi", metavar="OPTIONS", default="", help="further options for mpirun, in quotes"
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", default=0, help="nodes of the job (default: 1)"
    )
    parser.add_argument(
        "--profile", metavar="NAME", default="",
        help="start through the engine launcher of this ipyparallel profile: PBS, LSF, SGE, …",
    )  # fmt: skip
    for name in ("partition", "account", "gpus-per-node", "time"):
        parser.add_argument(
            f"--{name}", metavar="VALUE", default="", help=f"of the Slurm job: sbatch --{name}"
        )
    parser.add_argument(
        "--sbatch", metavar="OPTIONS", default="",
        help='further options for sbatch, in quotes, such as "--qos=high --exclusive"',
    )  # fmt: skip


def parse_init(line: str) -> argparse.Namespace:
    """Return the arguments of `%dist_init`, with `lease` and `launch` as what they stand for."""
    args = INIT.parse(line)
    if args.attach is not None and (given := _given(args)):
        msg = f"%dist_init --attach takes the session as it is: leave out {', '.join(given)}"
        raise UsageError(msg)
    args.lease = Lease(args.lease, args.strict_lease)
    if args.profile and args.engines == "local":
        args.engines = "profile"
    if args.check and args.engines == "local":
        msg = "--check looks at other hosts: add --engines ssh --hosts alpha,beta"
        raise UsageError(msg)
    options = {field.name: getattr(args, field.name) for field in fields(Launch)}
    hosts = parse_hosts(args.hosts) if args.hosts else ()
    args.launch = Launch(**{**options, "hosts": hosts})
    return args


def _given(args: argparse.Namespace) -> list[str]:
    return [
        option
        for action in INIT.actions
        if (option := (action.option_strings or [""])[0]) not in ("-h", "--attach")
        and getattr(args, action.dest) != action.default
    ]


INIT = _init()
STATUS = Parser("%dist_status", "Show every rank: device, memory, state.")
WHERE = Parser("%dist_where", "Show where every rank is now; answers while the ranks are busy.")
SHUTDOWN = Parser("%dist_shutdown", "End the engines; names that live on the ranks are lost.")
