"""DistMagics: every magic of dtkit. Each parses its line, calls the session, shows the result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipykernel
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.display import display
from traitlets import Unicode

from dtkit._ranks import parse_ranks
from dtkit.errors import InvalidInputError
from dtkit.magics import lines
from dtkit.magics.arguments import usage_errors
from dtkit.magics.cells import (
    go_on_in_background,
    run_on_ranks,
    train_on_ranks,
    with_header,
)
from dtkit.magics.tables import StageLine, StatusTable
from dtkit.recipe import Recipe
from dtkit.session import Session, current_session
from dtkit.waiting import drive, drive_async

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.run import Requests

__all__ = ["DistMagics"]

_SERVES_CLICKS_FROM = 7
"""ipykernel's major version that serves clicks while a cell awaits."""


@magics_class
class DistMagics(Magics):
    """The magics of dtkit; `%config DistMagics` lists what can be set."""

    runs_dir = Unicode(
        "dtkit_runs", help="Folder in which every run gets a folder of its own."
    ).tag(config=True)

    @line_magic
    @usage_errors
    def dist_init(self, line: str) -> None:
        """Start one engine per device, with a process group across them."""
        args = lines.INIT.parse(line)
        session = current_session()
        if session is not None:
            self._describe_running(session, args.n)
            return
        stage = StageLine("starting")
        try:
            session = Session.start(
                args.n,
                devices=args.devices,
                backend=args.backend,
                oversubscribe=args.oversubscribe,
                runs_dir=self.runs_dir,
                on_stage=stage.show,
            )
        except BaseException:
            stage.finish("not started")
            raise
        stage.finish(lines.started_line(session))

    @line_cell_magic
    @usage_errors
    def dist_train(self, line: str, cell: str | None = None) -> None:
        """Train the cell (or a script) on every rank, with a live dashboard."""
        prepared = self._training(line, cell, can_click=False)
        if prepared is not None:
            drive(*prepared)

    @line_cell_magic
    @usage_errors
    def dist(self, line: str, cell: str | None = None) -> None:
        """Run the cell (or an expression) on all ranks, or on some."""
        steps, requests = self._running(line, cell)
        drive(steps, requests)

    async def run_cell_async(self, name: str, line: str, cell: str) -> None:
        """Run one of the cell magics without blocking the kernel; see `awaiting`."""
        prepare = usage_errors(self._training if name == "dist_train" else self._running)
        prepared = prepare(line, cell)
        if prepared is not None:  # None: help was asked for, or it goes on in the background
            await drive_async(*prepared)

    @line_magic
    @usage_errors
    def dist_push(self, line: str) -> None:
        """Copy objects from the notebook to the ranks."""
        args = lines.PUSH.parse(line)
        missing = [name for name in args.names if name not in self._names]
        if missing:
            msg = f"%dist_push: no {', '.join(missing)} in the notebook"
            raise UsageError(msg)
        session = self._session()
        ranks = parse_ranks(args.ranks, session.world_size)
        for sent in session.push({n: self._names[n] for n in args.names}, ranks=ranks):
            self._say(str(sent))

    @line_magic
    @usage_errors
    def dist_pull(self, line: str) -> None:
        """Copy objects from a rank to the notebook; tensors and modules arrive on the CPU."""
        args = lines.PULL.parse(line)
        if args.new_name and len(args.names) > 1:
            msg = "%dist_pull: --as names one object; pull the others by themselves"
            raise UsageError(msg)
        session = self._session()
        (rank,) = _one_rank(args.rank, session)
        for name in args.names:
            pulled = session.pull(name, rank=rank)
            self._names[args.new_name or name.rpartition(".")[2]] = pulled.value
            self._say(str(pulled))

    @line_magic
    @usage_errors
    def dist_status(self, line: str) -> StatusTable:
        """Show every rank: device, memory, state."""
        lines.STATUS.parse(line)
        session = self._session()
        return StatusTable(str(session), session.status())

    @line_magic
    @usage_errors
    def dist_stop(self, line: str) -> None:
        """Stop the run that is going on, at the next step boundary."""
        lines.STOP.parse(line)
        self._session().stop()
        self._say("stopping after the step")

    @line_magic
    @usage_errors
    def dist_shutdown(self, line: str) -> None:
        """End the engines; names that live on the ranks are lost."""
        lines.SHUTDOWN.parse(line)
        session = current_session()
        if session is None:
            self._say("nothing is running")
            return
        session.close()
        self._say(f"ended: {session}")

    def _training(
        self, line: str, cell: str | None, *, can_click: bool = True
    ) -> tuple[Iterator[None], Requests] | None:
        args = lines.parse_train(line, is_cell=cell is not None)
        session = self._session()
        if cell is None:
            code = _script_call(args.words)
        elif not cell.strip():
            msg = "%%dist_train: the cell is empty; write the training code under the magic's line"
            raise UsageError(msg)
        else:
            code = with_header(f"%%dist_train {line}".rstrip(), cell)
        steps, requests = train_on_ranks(
            session,
            code,
            can_click=args.background or (can_click and _serves_clicks()),
            recipe=Recipe(manual=args.manual, batch=args.batch),
            name=args.name,
            ranks=parse_ranks(args.ranks, session.world_size),
        )
        if not args.background:
            return steps, requests
        go_on_in_background(steps, requests)
        return None

    def _running(self, line: str, cell: str | None) -> tuple[Iterator[None], Requests]:
        ranks_text, expression = lines.split_dist(line, is_cell=cell is not None)
        session = self._session()
        ranks = parse_ranks(ranks_text, session.world_size)
        code = expression if cell is None else with_header(f"%%dist {line}".rstrip(), cell)
        return run_on_ranks(session, code, ranks)

    @property
    def _names(self) -> dict[str, Any]:
        """The notebook's namespace."""
        shell: Any = self.shell  # there always is one: the magics were registered with it
        names: dict[str, Any] = shell.user_ns
        return names

    def _session(self) -> Session:
        session = current_session()
        if session is None:
            msg = "no engines are running: start them with %dist_init"
            raise InvalidInputError(msg)
        return session

    def _describe_running(self, session: Session, num_ranks: int | None) -> None:
        if num_ranks not in (None, session.world_size):
            msg = (
                f"%dist_init -n {num_ranks}: {session} are running; "
                f"to change, run %dist_shutdown and then %dist_init -n {num_ranks}"
            )
            raise UsageError(msg)
        self._say(f"running: {session}; nothing was changed")

    def _say(self, text: str) -> None:
        display({"text/plain": text, "text/html": f"<pre>{text}</pre>"}, raw=True)


def _serves_clicks() -> bool:
    return int(ipykernel.__version__.split(".")[0]) >= _SERVES_CLICKS_FROM


def _one_rank(text: str, session: Session) -> tuple[int]:
    ranks = parse_ranks(text, session.world_size)
    if len(ranks) != 1:
        msg = f"--rank {text}: name one rank, 0 to {session.world_size - 1}"
        raise InvalidInputError(msg)
    return (ranks[0],)


def _script_call(words: list[str]) -> str:
    path = Path(words[0]).expanduser()
    if not path.is_file():
        msg = f"%dist_train {words[0]}: no such file; a cell of code wants two percent signs"
        raise UsageError(msg)
    run = "__import__('dtkit.engine.script', fromlist=['run']).run"
    source = f"{run}({str(path.resolve())!r}, {words!r})"
    return f"# %dist_train {shlex.join(words)}\n{source}"
