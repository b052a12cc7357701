"""Sessions on real engines, and a cell run in plain Python beside the same cell on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from rig import DIGITS, Rig

import dtkit
from dtkit.guard.processes import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Any: what a cell leaves in its namespace.


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names of the earlier cell, in this process."""
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        # torch sets it when its compiler is loaded, at an optimizer's first step.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        exec(DIGITS, namespace)  # noqa: S102  our own text
        yield namespace


@pytest.fixture(scope="module")
def start_session(
    tmp_path_factory: pytest.TempPathFactory,
    owned_pids: set[int],
    one_thread: None,  # noqa: ARG001  before the engines start
) -> Iterator[Callable[[int], dtkit.Session]]:
    """Start the module's session; when it is closed no process of it is left."""
    sessions: list[tuple[dtkit.Session, set[int]]] = []

    def start(num_ranks: int) -> dtkit.Session:
        session = dtkit.Session.start(num_ranks, runs_dir=tmp_path_factory.mktemp("runs"))
        pids = set(session.pids())
        owned_pids.update(pids)
        sessions.append((session, pids))
        return session

    yield start
    for session, pids in sessions:
        session.close()
        owned_pids.difference_update(pids)
        assert not [pid for pid in pids if Identity.of(pid)]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let processes that are started compute on one thread: ranks outnumber the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def session2(start_session: Callable[[int], dtkit.Session]) -> dtkit.Session:
    """Two ranks. A process has one session at a time: use `session4` in another module."""
    return start_session(2)


@pytest.fixture(scope="module")
def session4(start_session: Callable[[int], dtkit.Session]) -> dtkit.Session:
    """Four ranks."""
    return start_session(4)


@pytest.fixture(scope="module")
def rig2(session2: dtkit.Session, digits: dict[str, Any]) -> Rig:
    """Two ranks with the digits."""
    session2.execute(DIGITS)
    return Rig(session2, digits)


@pytest.fixture(scope="module")
def rig4(session4: dtkit.Session, digits: dict[str, Any]) -> Rig:
    """Four ranks with the digits."""
    session4.execute(DIGITS)
    return Rig(session4, digits)
