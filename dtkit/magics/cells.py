"""Cells on the ranks: sent, shown while they run, shown for good when they end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ipykernel
from IPython.core.getipython import get_ipython

from dtkit.driver.waiting import in_background
from dtkit.errors import InvalidInputError
from dtkit.views.celltext import CellText, Displays
from dtkit.views.dashboard import make_dashboard
from dtkit.views.guarded import GuardedDashboard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.driver.requests import Requests
    from dtkit.driver.runs.run import Run
    from dtkit.driver.session import Session
    from dtkit.livecontrol import Value

__all__ = [
    "always",
    "go_on_in_background",
    "run_on_ranks",
    "serves_clicks",
    "show_run",
    "train_on_ranks",
    "with_header",
]

_SHOW_AFTER_S = 0.1
"""A dashboard is built after this: it would take the ranks' cores just when they begin, and a
run that is over by then needs none."""
_SERVES_CLICKS_FROM = (7, 4)
"""The version of ipykernel that serves clicks while a cell awaits, in any front end."""
_SERVES_IN_SUBSHELLS_FROM = (7, 0)
"""The one that serves them in a subshell if the front end asks for one: JupyterLab, not VS Code."""


def serves_clicks(*, is_awaiting: bool) -> Callable[[], bool] | None:
    """Return what tells whether this kernel serves clicks while a cell runs; None: it never does.

    Args:
        is_awaiting: whether the cell awaits, rather than blocks.
    """
    version = ipykernel.version_info[:2]
    if not is_awaiting or version < _SERVES_IN_SUBSHELLS_FROM:
        return None
    return always if version >= _SERVES_CLICKS_FROM else _has_subshell


def always() -> bool:
    """Return that clicks are served: no cell runs meanwhile."""
    return True


def _has_subshell() -> bool:
    # The front end opens one for its widgets, if it is one that does, when the first is shown.
    kernel: Any = getattr(get_ipython(), "kernel", None)
    manager = getattr(getattr(kernel, "shell_channel_thread", None), "manager", None)
    return manager is not None and bool(manager.list_subshell())


def with_header(magic_line: str, body: str) -> str:
    """Return the cell as it is sent: with the magic's line as a comment.

    So a line has the same number in the ranks' tracebacks as in the notebook.
    A body that begins with a magic of its own, or with an indent, is sent as it
    is: a comment before it would change what it means.
    """
    first = body.lstrip("\n").split("\n", 1)[0]
    if first.startswith(("%%", " ", "\t")):
        return body
    return f"# {magic_line}\n{body}"


def run_on_ranks(
    session: Session, code: str, ranks: Sequence[int] | None
) -> tuple[Iterator[None], Requests]:
    """Send a cell; return the steps that show it and the place for requests."""
    output, requests, steps = session.running(code, ranks=ranks)
    shown = CellText(output, session.world_size)

    def showing() -> Iterator[None]:
        try:
            for _ in steps:
                shown.refresh()
                yield
        finally:
            shown.finish()

    return showing(), requests


def train_on_ranks(
    session: Session,
    code: str,
    *,
    can_click: Callable[[], bool] | None,
    **options: Any,  # recipe, name, ranks: as Session.training takes them
) -> tuple[Iterator[None], Requests]:
    """Send a training cell under a dashboard; the same for it."""
    run, steps = session.training(code, **options)
    return show_run(run, steps, session.world_size, can_click=can_click), run.requests


def show_run(
    run: Run, steps: Iterator[None], world_size: int, *, can_click: Callable[[], bool] | None
) -> Iterator[None]:
    """Return the steps of a run that show it, under a dashboard, as they go on."""
    dashboard = GuardedDashboard(
        make_dashboard(
            on_stop=run.requests.stop,
            on_pause=run.requests.pause,
            on_control=_steer(run),
            curves=run.curves,
            can_click=can_click,
        ),
        run.note,
    )
    displays = Displays(run.output, world_size)

    def showing() -> Iterator[None]:
        begin_s: float | None = time.monotonic() + _SHOW_AFTER_S
        try:
            for _ in steps:
                if begin_s is not None and time.monotonic() > begin_s:
                    begin_s = None
                    dashboard.start(run.view())
                if dashboard.is_due():
                    dashboard.update(run.view(), run.output.blocks())
                displays.refresh()
                yield
        finally:
            _settle(run)
            dashboard.finish(run.view(), run.output.blocks())
            displays.refresh(is_final=True)
            run.shown.set()

    run.shown.clear()
    return showing()


def _steer(run: Run) -> Callable[[str, Value], None]:
    """Return what the panel calls when a live control was moved."""

    def steer(name: str, value: Value) -> None:
        try:
            run.set_controls(**{name: value})
        except InvalidInputError as error:  # it has ended meanwhile
            run.note(str(error))

    return steer


def go_on_in_background(steps: Iterator[None], requests: Requests) -> None:
    """Begin the steps here, where the cell's output is, and exhaust them in a thread.

    What the run fails with is in `Run.error`, in its summary, and raised by `Run.wait`.
    """
    # Before the first step: whether it goes on with the kernel is asked for the whole of it.
    requests.is_background = True
    next(steps, None)
    shell: Any = get_ipython()
    if hasattr(shell, "get_parent"):
        parent = shell.get_parent()
        # What a thread displays goes to the newest cell otherwise.
        in_background(steps, requests, lambda: shell.set_parent(parent))
    else:
        in_background(steps, requests)


def _settle(run: Run) -> None:
    # The steps end the run; only if they were never begun, or the run was left to go
    # on without this kernel, is it still open.
    if run.state == "running" and not run.requests.is_left:
        run.end("failed")
