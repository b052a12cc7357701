"""The magic that changes a run while it goes on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class

from dtkit.driver.registry import last_run
from dtkit.errors import InvalidInputError
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import DtkitMagics, say
from dtkit.magics.tables import ControlTable

if TYPE_CHECKING:
    from dtkit.driver.runs.run import Run

__all__ = ["CONTROL", "DistControlMagics"]

_WAIT_S = 2.0
_POLL_S = 0.02


@magics_class
class DistControlMagics(DtkitMagics):
    """Live controls, of this notebook's run or of another notebook's."""

    @line_magic
    @usage_errors
    def dist_control(self, line: str) -> ControlTable | None:
        """Change a live control of the run that goes on, or list them all."""
        args = CONTROL.parse(line)
        run = self._run(args.run, args.dir)
        if args.value is None:
            if args.name not in (None, *run.controls):
                msg = f"no control {args.name!r}: run {run.name!r} has {', '.join(run.controls)}"
                raise InvalidInputError(msg)
            return ControlTable(run, args.name)
        num_before = len(run.changes)
        run.set_controls(**{args.name: args.value})
        say(self._outcome(run, num_before))
        return None

    def _run(self, name: str | None, folder: str | None) -> Run:
        live = last_run()
        if name is None and folder is None and live is not None and live.state == "running":
            return live
        shell: Any = self.shell
        found = shell.magics_manager.registry["DistLookMagics"].runs(folder)
        if name is not None:
            named: Run = found[name]
            return named
        going_on: Run | None = found.newest_running()
        if going_on is None:
            msg = f"no run goes on in {found.folder}; --dir names another folder of runs"
            raise InvalidInputError(msg)
        return going_on

    def _outcome(self, run: Run, num_before: int) -> str:
        if run.driven == "elsewhere":
            return f"asked the notebook that drives {run.name}: it is taken after a step"
        end_s = time.monotonic() + _WAIT_S
        while time.monotonic() < end_s and run.state == "running":
            new = run.changes[num_before:]
            if new:
                each = ", on each rank from a step of its own" if run.recipe.is_free else ""
                return f"{new[-1]}{each}"
            time.sleep(_POLL_S)
        return "asked for: all ranks take it after the step that they are in"


def _control() -> Parser:
    parser = Parser(
        "%dist_control",
        "Change a live control of the run that goes on, on all ranks from the same step on; "
        "without a value, list them. lr_factor, which multiplies every learning rate, is there in "
        "any run; the cell makes others with dtkit.control(name, default).",
    )
    parser.add_argument(
        "name", nargs="?", metavar="CONTROL",
        help="which; lr means the learning rate itself (it sets lr_factor)",
    )  # fmt: skip
    parser.add_argument("value", nargs="?", metavar="VALUE", help="what it is to be")
    parser.add_argument(
        "--run", metavar="RUN", help="which run, also of another notebook (default: the newest)"
    )
    parser.add_argument("--dir", metavar="DIR", help="folder of the runs (default: dtkit_runs)")
    return parser


CONTROL = _control()
