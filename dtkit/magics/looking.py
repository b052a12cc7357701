"""The magics that look at runs: the list of them, TensorBoard, where the time went."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import line_magic, magics_class

from dtkit.driver.registry import current_session, last_run
from dtkit.driver.runs.archive import runs
from dtkit.driver.runs.timeline import Timeline, timeline_of
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import DtkitMagics, say
from dtkit.tensorboard.server import Boards, has_events

if TYPE_CHECKING:
    from dtkit.driver.runs.archive import Runs
    from dtkit.tensorboard.server import TensorBoard

__all__ = ["DistLookMagics"]


@magics_class
class DistLookMagics(DtkitMagics):
    """Magics that show what runs left behind; none of them needs engines."""

    def __init__(self, shell: Any) -> None:  # Any: Magics is not typed
        super().__init__(shell)
        self._boards = Boards()
        """Those that were opened without a session: they end with the kernel."""
        atexit.register(self._boards.close)

    @line_magic
    @usage_errors
    def dist_runs(self, line: str) -> Any:  # Any: what is shown
        """List the runs on disk, read one back, compare several, or delete some."""
        args = RUNS.parse(line)
        found = self.runs(args.dir)
        if args.delete:
            if not args.names:
                msg = "%dist_runs --delete: name the runs to delete"
                raise UsageError(msg)
            found.delete(*args.names)
            say(f"deleted: {', '.join(args.names)}")
            return None
        if not args.names:
            return found
        return found[args.names[0]] if len(args.names) == 1 else found.compare(*args.names)

    @line_magic
    @usage_errors
    def dist_tensorboard(self, line: str) -> TensorBoard:
        """Show TensorBoard, on the folder of the runs or on another; it ends with the session."""
        args = TENSORBOARD.parse(line)
        found = self.runs()
        for name in args.names:
            run = found[name]
            if not has_events(run.dir):
                run.write_tensorboard()
        folder = Path(args.logdir) if args.logdir else found.folder
        session = current_session()
        return self._boards.open(folder) if session is None else session.tensorboard(folder)

    @line_magic
    @usage_errors
    def dist_timeline(self, line: str) -> Any:  # Any: what is shown
        """Show where a run's time went, or that of several runs side by side."""
        args = TIMELINE.parse(line)
        found = self.runs(args.dir)
        chosen = [found[name] for name in args.names]
        if not chosen:
            run = last_run()
            if run is None:
                msg = "%dist_timeline: no run in this kernel yet; name one of %dist_runs"
                raise UsageError(msg)
            chosen = [run]
        if args.zoom and len(chosen) > 1:
            msg = "%dist_timeline --zoom: name one run"
            raise UsageError(msg)
        if args.operators:
            return chosen[0].operators()
        return Timeline(chosen[0]).zoomable() if args.zoom else timeline_of(*chosen)

    def runs(self, folder: str | None = None) -> Runs:
        """Return the runs of a folder: the named, the session's, or the configured one."""
        if folder is None and current_session() is None:
            shell: Any = self.shell
            made = shell.magics_manager.registry.get("DistMagics")
            folder = made.runs_dir if made is not None else None
        return runs(folder)


def _runs_parser() -> Parser:
    parser = Parser(
        "%dist_runs",
        "List the runs on disk (none named), read one back (a Run), or compare several.",
    )
    parser.add_argument("names", nargs="*", metavar="RUN")
    parser.add_argument("--delete", action="store_true", help="remove the named runs' folders")
    parser.add_argument("--dir", metavar="DIR", help="folder of the runs (default: dtkit_runs)")
    return parser


def _tensorboard_parser() -> Parser:
    parser = Parser(
        "%dist_tensorboard",
        "Show TensorBoard here; named runs that were not written for it are written now.",
    )
    parser.add_argument("names", nargs="*", metavar="RUN")
    parser.add_argument("--logdir", metavar="DIR", help="what to show (default: all runs)")
    return parser


def _timeline_parser() -> Parser:
    parser = Parser(
        "%dist_timeline",
        "Show where the time of a run went that was recorded with %%dist_train --timeline.",
    )
    parser.add_argument("names", nargs="*", metavar="RUN", help="default: the last run")
    parser.add_argument(
        "--operators", action="store_true",
        help="what each operator took on each rank, of a run with %%%%dist_train --profile",
    )  # fmt: skip
    parser.add_argument(
        "--zoom", action="store_true",
        help="all steps as a picture that is zoomed with the wheel and moved by dragging; needs "
        "dtkit[live]",
    )  # fmt: skip
    parser.add_argument("--dir", metavar="DIR", help="folder of the runs (default: dtkit_runs)")
    return parser


RUNS = _runs_parser()
TIMELINE = _timeline_parser()
TENSORBOARD = _tensorboard_parser()
