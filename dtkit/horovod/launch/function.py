"""`horovod.run`: a function on every rank, its results in a list."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from dtkit.errors import InvalidInputError
from dtkit.horovod.errors import HorovodInternalError
from dtkit.horovod.launch.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dtkit.driver.session import Session

__all__ = ["run"]

_NAME = "_dtkit_hvd_call"


def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    *,
    np: int | None = None,
    env: Mapping[str, str] | None = None,
    verbose: bool = False,
) -> list[Any]:
    """Call a function on every rank and return its results, in the order of the ranks.

    In a notebook whose engines run, on these; else in new processes on this host.

    Args:
        func: carried over by cloudpickle, with what it refers to.
        args: its arguments.
        kwargs: its keyword arguments.
        num_proc: how many ranks; None: as many as there are engines.
        np: the older name of `num_proc`.
        env: variables for new processes.
        verbose: whether to show what new processes write.

    Raises:
        InvalidInputError: it is not known how many, or other than there are engines.
        RankError: it failed on an engine.
        HorovodInternalError: it failed in a new process.
    """
    call = (func, tuple(args), dict(kwargs or {}))
    wanted = num_proc if num_proc is not None else np
    session = _session()
    if session is not None:
        return _on_engines(session, call, wanted)
    if wanted is None:
        msg = "say how many ranks: horovod.run(func, num_proc=2), or start engines with %dist_init"
        raise InvalidInputError(msg)
    return _in_processes(call, wanted, env or {}, is_quiet=not verbose)


def _session() -> Session | None:
    module = sys.modules.get("dtkit.driver.registry")
    return None if module is None else module.current_session()


def _on_engines(session: Session, call: tuple[Any, ...], wanted: int | None) -> list[Any]:
    if wanted not in (None, session.world_size):
        msg = f"num_proc={wanted}: {session} is open; leave num_proc out, or start as many ranks"
        raise InvalidInputError(msg)
    session.push({_NAME: cloudpickle.dumps(call)})
    session.execute(
        f"{_NAME} = (lambda f, a, k: f(*a, **k))(*__import__('cloudpickle').loads({_NAME}))"
    )
    results = [session.pull(_NAME, rank=rank).value for rank in session.ranks]
    session.execute(f"del {_NAME}")
    return results


def _in_processes(
    call: tuple[Any, ...], num_proc: int, env: Mapping[str, str], *, is_quiet: bool
) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="dtkit-hvd-") as folder:
        path = Path(folder)
        (path / "call").write_bytes(cloudpickle.dumps(call))
        command = [sys.executable, "-m", "dtkit.horovod.launch.worker", folder]
        workers = Workers(command, num_proc, env, folder, is_quiet=is_quiet)
        try:
            failed = workers.wait()
        finally:
            workers.stop()
        if failed is not None:
            error = (path / f"rank.{failed.number}" / "stderr").read_text()
            msg = f"rank {failed.number} ended with exit code {failed.code}:\n{error[-4000:]}"
            raise HorovodInternalError(msg)
        # Written by processes of this call, in a folder that only this user can enter.
        return [
            cloudpickle.loads((path / f"result.{rank}").read_bytes()) for rank in range(num_proc)
        ]
