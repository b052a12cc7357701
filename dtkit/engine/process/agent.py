"""The engine's own agent: one per process, answers the driver even while a cell runs.

It owns the process group and the current run, takes control requests on
ipyparallel's control thread (over its authenticated channel: no port of our
own) and sends events along the cell's output.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import termios
import time
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from dtkit.engine.process import memory, modes
from dtkit.engine.process.interrupts import protect
from dtkit.engine.process.shell import current_shell
from dtkit.events import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.engine.process.group import Group
    from dtkit.events import Event

__all__ = ["Agent", "Averaged", "agent", "current_run", "install"]

Request = dict[str, Any]  # Any: JSON

_DRAIN_TIMEOUT_S = 0.5
_DRAIN_STEP_S = 0.0005


class Averaged(Protocol):
    """What is told by whoever else averages gradients."""

    def stand_back(self, params: Sequence[Any], reason: str) -> None:
        """Leave parameters to whoever distributes them already."""

    def waited(self, seconds: float) -> None:
        """Note that the rank has waited so long for others, until now."""

    def sent(self, sent_bytes: float, raw_bytes: float) -> None:
        """Note what the rank sends to average gradients, and what it would send uncompressed."""


class Run(Averaged, Protocol):
    """What is asked of a run through the agent."""

    ranks: tuple[int, ...]

    def answer(self, request: Request) -> Request:
        """Answer a control request that is about the run."""


class Agent:
    """State of this engine; see the module's docstring."""

    def __init__(self, kernel: Any) -> None:  # Any: ipykernel's kernel is untyped
        self.kernel = kernel
        self._pid = os.getpid()
        self.group: Group | None = None
        self.group_store: Any = None
        self.detached: list[Any] = []
        """DDP models of the last group, which the next one takes in."""
        self.retired: list[Any] = []
        """Weakly, the models that several ranks held together in it."""
        self.run: Run | None = None
        self._is_ending_run = False
        self.drawn: Any = {}  # by DataLoader, what it was divided into last
        self.snapshot: Any = None  # what `dtkit.engine.snapshot` keeps
        self._parent: dict[str, Any] = {}
        self.has_run_cells: bool = False
        self._num_cells = 0
        self._is_leaving = False
        self._was_cut = False
        self._cell_begun_s = 0.0
        self._handlers: dict[str, Callable[[Request], Request]] = {"cut": self._cut}

    def on(self, operation: str, handler: Callable[[Request], Request]) -> None:
        """Let `handler` answer control requests of this name, on the control thread."""
        self._handlers[operation] = handler

    @property
    def is_busy(self) -> bool:
        """Whether a cell or a call of the driver is running on the main thread."""
        is_blocking = bool(self.kernel.shell_is_blocking)
        return self._num_cells > 0 or self._is_ending_run or is_blocking

    @contextmanager
    def ending_run(self) -> Iterator[None]:
        """Be busy within the context, after the cell: ranks may wait for each other there, too."""
        self._is_ending_run = True
        try:
            yield
        finally:
            self._is_ending_run = False

    @property
    def cell_seconds(self) -> float:
        """How long the cell has been running that was begun last."""
        return time.monotonic() - self._cell_begun_s

    @property
    def is_in_user_code(self) -> bool:
        """Whether a cell's own code is running, and not what comes after it."""
        return self._num_cells > 0 and not self._is_leaving

    @property
    def cell_ranks(self) -> tuple[int, ...]:
        """The ranks that the last cell was sent to; empty where its sender does not tell."""
        return tuple(self._parent.get("metadata", {}).get("dtkit_ranks", ()))

    def note_parent(self) -> None:
        """Remember the request that is running: events are sent as its output."""
        self._parent = self.kernel.get_parent("shell")

    def send(self, events: list[Event]) -> None:
        """Send events to the driver, from any thread."""
        lines = [encode(event, is_compact=True) for event in events]
        self._send("dtkit_events", b"\n".join(lines))

    def _send(self, kind: str, *buffers: bytes) -> None:
        self.kernel.session.send(
            self.kernel.iopub_socket,
            kind,
            content={},
            parent=self._parent,
            ident=b"dtkit.events",
            buffers=list(buffers),
        )

    def before_cell(self, _info: Any) -> None:
        """Count the cell in; IPython calls this."""
        self.has_run_cells = True
        if not self._num_cells:
            self._cell_begun_s = time.monotonic()
            self._is_leaving = self._was_cut = False
            self.note_parent()
        self._num_cells += 1

    def after_cell(self, result: Any) -> None:
        """Count the cell out, once all that it wrote is on its way; IPython calls this."""
        self._is_leaving = self._num_cells == 1
        self._num_cells -= 1
        if os.getpid() != self._pid and not self._num_cells:
            _end_child(0 if result.success else 1)
        drain_descriptors()

    def tell_failure(self, show: Callable[..., Any]) -> Callable[..., Any]:
        """Return IPython's `showtraceback` made to tell the driver first that the cell has failed.

        Formatting a traceback takes a tenth of a second and more; other ranks may
        be waiting for this one meanwhile.
        """

        @wraps(show)
        def showtraceback(*args: Any, **kwargs: Any) -> Any:
            if self._num_cells == 1:  # not a cell within the cell, as under %%capture
                self._is_leaving = True
                self._send("dtkit_failed")
            if not self._was_cut:
                return show(*args, **kwargs)
            # Nobody reads how a rank left a collective that was cut, and IPython would parse
            # the source of torch for it: half a second and 8 MiB.
            style = self.kernel.shell.InteractiveTB
            mode = style.mode
            style.set_mode("Plain")
            try:
                return show(*args, **kwargs)
            finally:
                style.set_mode(mode)

        return showtraceback

    def _cut(self, request: Request) -> Request:
        # They load torch; the agent itself does not need it.
        from dtkit.engine.process.group import release
        from dtkit.engine.process.where import look

        try:
            place = look(self).to_dict()
        except Exception:  # to be freed matters more than to be described
            logging.getLogger("dtkit").exception("where this rank is cannot be told")
            place = {}
        # Idle: it has come to its end meanwhile, and the group may be a new one already.
        is_due = self.is_busy and (
            place.get("state") == "collective" or not request.get("only_waiting", False)
        )
        group, meant = self.group, request.get("generation")
        if group is not None and meant not in (None, group.generation):
            is_due = False  # a request that was long under way: its group is no more
        if is_due and group is not None:
            self._was_cut = True
            release(group, is_hard=request.get("is_hard", False))
        return {"is_cut": is_due, "place": place, "has_begun": self._num_cells > 0}

    def _on_request(self, stream: Any, ident: Any, parent: Any) -> None:
        request = json.loads(parent["content"]["json"])
        try:
            reply = self._answer(request)
        except Exception as error:  # noqa: BLE001  the driver gets it as the answer
            reply = {"error": f"{type(error).__name__}: {error}"}
        self.kernel.session.send(
            stream, "dtkit_reply", {"json": json.dumps(reply)}, parent=parent, ident=ident
        )

    def _answer(self, request: Request) -> Request:
        handler = self._handlers.get(request["operation"])
        if handler is not None:
            return handler(request)
        if self.run is None:
            return {"running": False}
        return {"running": True, **self.run.answer(request)}


def install() -> None:
    """Install the agent into this engine's kernel; harmless when it is there."""
    kernel = current_shell().kernel
    if getattr(kernel, "dtkit_agent", None) is None:
        kernel.dtkit_agent = installed = Agent(kernel)
        kernel.control_handlers["dtkit_request"] = installed._on_request  # noqa: SLF001
        kernel.shell.events.register("pre_run_cell", installed.before_cell)
        kernel.shell.events.register("post_run_cell", installed.after_cell)
        memory.install(installed)
        modes.install()
        kernel.shell.ask_exit = _end_cell
        protect(kernel, lambda: installed.is_in_user_code)
        kernel.shell.showtraceback = installed.tell_failure(kernel.shell.showtraceback)


def _end_cell() -> None:
    """Stand in for what `exit()` asks: it would end the engine, and all that it holds."""
    raise SystemExit


def _end_child(status: int) -> NoReturn:
    """End a process that the cell forked, and that has come to the cell's end as this one will.

    It would go on as a second kernel on the engine's own sockets, and whoever waits for it
    waits for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def agent() -> Agent:
    """Return this engine's agent.

    Raises:
        RuntimeError: this process is not an engine of dtkit.
    """
    found = getattr(getattr(current_shell(), "kernel", None), "dtkit_agent", None)
    if found is None:
        msg = "this process is not an engine that dtkit started"
        raise RuntimeError(msg)
    return found  # type: ignore[no-any-return]


def current_run() -> Any:  # Any: ActiveRun, whose module loads torch
    """Return the run that is active on this rank, None if there is none.

    Nor is there one in a plain process, such as a script under torchrun.
    """
    try:
        return agent().run
    except RuntimeError:
        return None


def drain_descriptors() -> None:
    """Wait until what was written to descriptors 1 and 2 has been taken over by ipykernel.

    A child process and C code write there. A thread of ipykernel's reads it; what
    it has not read when the cell ends comes after the cell's end, and is lost.
    """
    descriptors = [getattr(stream, "_fid", None) for stream in (sys.stdout, sys.stderr)]
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    while time.monotonic() < deadline:
        is_waiting = [
            any(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
            for descriptor in descriptors
            if descriptor is not None
        ]
        # Also when nothing waits: the thread may have read and not yet have
        # had the GIL to pass it on.
        time.sleep(_DRAIN_STEP_S)
        if not any(is_waiting):
            break
