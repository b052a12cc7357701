"""Sessions on real engines, and a cell run in plain Python beside the same cell on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from handover import Handover
from rig import DIGITS, Rig
from shells import Notebook

import dtkit
from dtkit.guard.processes import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Any: what a cell leaves in its namespace.

SHARED = ("session2", "session4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules that work with the same session behind each other."""
    place = {item.path: len(SHARED) for item in items}
    for item in items:
        for number, name in enumerate(SHARED):
            if name in _fixtures(item):
                place[item.path] = number
    items.sort(key=lambda item: place[item.path])


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


_FOLLOWING: pytest.StashKey[Path | None] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Note which module is next: what a fixture of this one leaves may be for it."""
    item.config.stash[_FOLLOWING] = None if nextitem is None else nextitem.path


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
) -> Iterator[Callable[[int], dtkit.Session]]:
    """Start a session of the module's own; when it is closed no process of it is left."""
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


@pytest.fixture(scope="session")
def handover(owned_pids: set[int]) -> Iterator[Handover]:
    """What modules take their session from, and leave it to for the next one."""
    opened = Handover(owned_pids)
    yield opened
    opened.close()


def _shared(request: pytest.FixtureRequest, num_ranks: int) -> Iterator[dtkit.Session]:
    handover: Handover = request.getfixturevalue("handover")
    runs: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    num_failed = request.session.testsfailed
    yield handover.take(num_ranks, runs.mktemp("runs"))
    following = request.config.stash[_FOLLOWING]
    is_next = any(
        item.path == following and f"session{num_ranks}" in _fixtures(item)
        for item in request.session.items
    )
    handover.leave(is_wanted=is_next and request.session.testsfailed == num_failed)


@pytest.fixture(scope="module")
def session2(request: pytest.FixtureRequest) -> Iterator[dtkit.Session]:
    """Two ranks. A process has one session at a time: use `session4` in another module."""
    yield from _shared(request, 2)


@pytest.fixture(scope="module")
def session4(request: pytest.FixtureRequest) -> Iterator[dtkit.Session]:
    """Four ranks."""
    yield from _shared(request, 4)


@pytest.fixture
def notebook(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Notebook:
    """A notebook with two ranks; the module has a fixture `shell`."""
    return Notebook(request.getfixturevalue("shell"), capsys)


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
