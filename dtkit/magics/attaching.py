"""The magics about sessions that their kernel left behind: taken over, listed, ended."""

from __future__ import annotations

from IPython.core.getipython import get_ipython
from IPython.core.magic import line_magic, magics_class
from IPython.display import display

from dtkit.driver.registry import last_run
from dtkit.driver.session import Session
from dtkit.errors import InvalidInputError
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import DtkitMagics, say
from dtkit.magics.cells import always, go_on_in_background, show_run
from dtkit.magics.tables import OrphanTable, StageLine

__all__ = ["ORPHANS", "DistOrphanMagics", "attach", "is_restarting", "note_orphans", "started_line"]


@magics_class
class DistOrphanMagics(DtkitMagics):
    """Magics about sessions without a kernel."""

    @line_magic
    @usage_errors
    def dist_orphans(self, line: str) -> OrphanTable | None:
        """List the sessions whose kernel is gone, or end one."""
        args = ORPHANS.parse(line)
        if args.end is None:
            return OrphanTable(Session.orphans())
        ended = Session.end_orphan(args.end)
        say(f"ended: session {ended.id}, {ended.num_processes} processes")
        return None


def attach(session: Session | None, session_id: str | None) -> None:
    """Take over a session and show its newest run; an open one: show its run again.

    Raises:
        InvalidInputError: another session is open, or there is none to take over.
    """
    if session is not None:
        if session_id not in (None, session.id):
            msg = f"session {session.id} is open; %dist_shutdown ends it, then attach to another"
            raise InvalidInputError(msg)
        say(f"running: session {session.id}, {session}")
        show_again()
        return
    stage = StageLine("attaching")
    try:
        session, run, steps = Session.attaching(session_id)
    except BaseException:
        stage.finish("not attached")
        raise
    stage.finish(f"attached: session {session.id}, {started_line(session)}")
    if run is not None and run.state == "running":
        shown = show_run(run, steps, session.world_size, can_click=always)
        go_on_in_background(shown, run.requests)
    elif run is not None:
        display(run)


def show_again() -> None:
    """Show the newest run under this cell as well: a page that was closed shows it no more."""
    run = last_run()
    if run is None:
        return
    if run.state != "running":
        display(run)
        return

    shown = show_run(run, run.watching(), len(run.ranks), can_click=always)
    go_on_in_background(shown, run.requests)


def note_orphans() -> None:
    """Say which sessions are left of earlier kernels, since they hold devices and memory."""
    for orphan in Session.orphans():
        what = f"run {orphan.run} goes on there" if orphan.run else "idle"
        say(
            f"session {orphan.id} of an earlier kernel lives on ({orphan.num_ranks} ranks, {what}):"
            f" %dist_orphans lists it and can end it"
        )


def started_line(session: Session) -> str:
    """Return the one line that `%dist_init` leaves."""
    facts = session.facts[0]
    devices = sorted({fact["device_name"] for fact in session.facts.values()})
    return (
        f"{session} · {', '.join(devices)} · torch {facts['torch']} · Python {facts['python']} "
        f"· {session.start_s:.1f} s"
    )


def is_restarting() -> bool:
    """Return whether this kernel ends because it is being restarted."""
    kernel = getattr(get_ipython(), "kernel", None)
    # ipykernel keeps what it will answer to the request that ends it.
    message = getattr(kernel, "_shutdown_message", None) or {}
    return bool(message.get("content", {}).get("restart"))


def _orphans() -> Parser:
    parser = Parser("%dist_orphans", "List the sessions whose kernel is gone, or end one.")
    parser.add_argument("--end", metavar="ID", help="end this one, each process by pid and start")
    return parser


ORPHANS = _orphans()
