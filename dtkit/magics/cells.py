"""Cells on the ranks: sent, shown while they run, shown for good when they end."""

from __future__ import annotations

import contextlib
import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipykernel
from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit._ranks import format_ranks
from dtkit.driver.waiting import in_background
from dtkit.errors import InvalidInputError
from dtkit.views import render
from dtkit.views.dashboard import make_dashboard
from dtkit.views.guarded import GuardedDashboard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.driver.requests import Requests
    from dtkit.driver.runs.celloutput import CellOutput, Display
    from dtkit.driver.runs.run import Run
    from dtkit.driver.session import Session
    from dtkit.livecontrol import Value

__all__ = [
    "ShownCell",
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
_REFRESH_S = 0.1
_MAX_SHOWN_CHARS = 50_000


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
    shown = ShownCell(output, session.world_size)

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
    displays = _Displays(run.output, world_size)

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


class ShownCell:
    """The text of a cell under it: in a notebook one output that changes, else plain lines."""

    def __init__(self, output: CellOutput, world_size: int) -> None:
        self._output = output
        self._world_size = world_size
        self._displays = _Displays(output, world_size)
        self._handle: Any = None  # DisplayHandle
        self._is_notebook = getattr(get_ipython(), "kernel", None) is not None
        self._num_changes = 0
        self._next_s = 0.0

    def refresh(self) -> None:
        """Show what is new, ten times a second at most."""
        if time.monotonic() < self._next_s or self._output.num_changes == self._num_changes:
            return
        self._next_s = time.monotonic() + _REFRESH_S
        self._num_changes = self._output.num_changes
        if self._is_notebook:
            self._draw()
        self._displays.refresh()

    def finish(self) -> None:
        """Show everything, results included, for good."""
        if self._is_notebook:
            self._draw(is_final=True)
        else:
            print(self._text(), end="")  # noqa: T201  a terminal: this is the cell's output
        self._displays.refresh(is_final=True)

    def _draw(self, *, is_final: bool = False) -> None:
        text = self._text()
        if not text:
            return
        bundle = {"text/html": self._html(is_final=is_final), "text/plain": text.rstrip("\n")}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _html(self, *, is_final: bool) -> str:
        blocks = self._output.blocks()
        html = ""
        if blocks:
            html = render.log_blocks(
                blocks, self._world_size, max_chars=_MAX_SHOWN_CHARS, is_live=not is_final
            )
        return html + "".join(
            f"<pre style='margin:2px 0'>{escape(line)}</pre>" for line in self._result_lines()
        )

    def _text(self) -> str:
        parts = []
        blocks = self._output.blocks()
        for block in blocks:
            label = format_ranks(block.ranks, self._world_size)
            is_everyone = len(block.ranks) == self._world_size
            parts.append("" if is_everyone and len(blocks) == 1 else f"── {label} ──\n")
            parts.append(block.text if block.text.endswith("\n") else block.text + "\n")
        parts += [line + "\n" for line in self._result_lines()]
        return "".join(parts)

    def _result_lines(self) -> list[str]:
        by_text: dict[str, list[int]] = {}
        for rank, text in sorted(self._output.results.items()):
            by_text.setdefault(text, []).append(rank)
        return [
            f"{format_ranks(ranks, self._world_size)}:{_gap(text)}{text}"
            for text, ranks in by_text.items()
        ]


class _Displays:
    """Figures and tables of the ranks, shown as the driver's own with a label."""

    def __init__(self, output: CellOutput, world_size: int) -> None:
        self._output = output
        self._world_size = world_size

    def refresh(self, *, is_final: bool = False) -> None:
        for shown in self._output.take_displays(is_final=is_final):
            self._show(shown)

    def _show(self, shown: Display) -> None:
        label = format_ranks(shown.ranks, self._world_size)
        if self._world_size > 1:
            html = f"<small>{escape(label)}</small>"
            display({"text/html": html, "text/plain": f"── {label} ──"}, raw=True)
        with contextlib.suppress(KeyError):
            shown.data.pop("application/vnd.jupyter.widget-view+json")  # its comm is elsewhere
        display(shown.data, metadata=shown.metadata, raw=True)


def _gap(text: str) -> str:
    return "\n" if "\n" in text else " "
