"""Guards for every test: what it leaves behind makes it fail.

A fixture that outlives a test (a cluster shared by a module) adds the ids of its processes to
`owned_pids` and takes them out again when it has ended them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_S = 5.0
"""How long threads and processes that are on their way out may take."""

MAY_CHANGE = {
    "PYTEST_CURRENT_TEST",  # pytest's own
    "KMP_DUPLICATE_LIB_OK",  # this and the next: scikit-learn, when it is imported
    "KMP_INIT_AT_FORK",
}

_MARKED_FOLDERS = ("browser", "cluster", "notebooks")
_TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--long`, what `make test-long` runs."""
    text = "run what the ordinary tests leave out for its time as well; see CONTRIBUTING.md"
    parser.addoption("--long", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Let processes compute on one thread, and each of several workers find only its sessions.

    Ranks outnumber the cores, and OpenMP's threads wait for each other by spinning.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if config.getoption("long"):
        os.environ["DTKIT_TEST_LONG"] = "1"  # for what is decided while modules are imported
    if hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dtkit-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["TMPDIR"] = tempfile.tempdir = folder.name


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether `--long` was given: a test that repeats something repeats it more often."""
    return bool(pytestconfig.getoption("long"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder, skip those that need a GPU where there is none.

    Those that are marked `long` are left out, unless `--long` asks for them.
    """
    if not config.getoption("long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _MARKED_FOLDERS:
            item.add_marker(folder.removesuffix("s"))
        if folder == "browser":
            item.add_marker("alone")
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def owned_pids() -> set[int]:
    """Processes that fixtures answer for; their children count as theirs too."""
    return set()


class Marked:
    """Finds the processes that inherited a mark through their environment, however far down."""

    NAME = "DTKIT_TEST_MARK"

    def __init__(self) -> None:
        self._value = f"{os.getpid()}-{time.monotonic_ns()}"

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Mark every process that is started within the context."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(self.NAME, self._value)
            yield

    def left(self) -> list[str]:
        """Return the commands of the marked processes that are running."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # another user's, or just gone
                is_marked = process.environ().get(self.NAME) == self._value
                if is_marked and process.pid != os.getpid():
                    found.append(_command(process))
        return found


@pytest.fixture(scope="module")
def marked() -> Marked:
    """A mark of this module's own."""
    return Marked()


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Fail a test that adds, changes or removes an environment variable; put it back."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    leaked = {
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    } - MAY_CHANGE
    for name in leaked:
        os.environ.pop(name)
        os.environ.update({name: before[name]} if name in before else {})
    assert not leaked, f"environment variables changed: {', '.join(sorted(leaked))}"


@pytest.fixture(autouse=True)
def no_leaked_thread() -> Iterator[None]:
    """Fail a test whose threads would keep the interpreter from ending."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + GRACE_S
    new = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    leaked = [thread.name for thread in new if thread.is_alive()]
    assert not leaked, f"threads left running: {', '.join(leaked)}"


@pytest.fixture(autouse=True)
def no_leaked_process(owned_pids: set[int]) -> Iterator[None]:
    """Fail a test that leaves a child process running; end that process."""
    before = set(_children())
    yield
    new = [p for p in _children() if p not in before and not _is_owned(p, owned_pids)]
    _, left = psutil.wait_procs(new, timeout=GRACE_S)
    leaked = [process for process in left if _runs(process)]
    commands = [_command(process) for process in leaked]
    for process in leaked:
        process.kill()
    assert not leaked, f"processes left running: {', '.join(commands)}"


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one whose parent has gone may wait for init to note it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_owned(process: psutil.Process, owned_pids: set[int]) -> bool:
    try:
        line = [process, *process.parents()]
        # Python's own helper, one for the life of the interpreter.
        is_pythons = any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:  # it ended meanwhile, or is a zombie: either way gone
        return True
    return is_pythons or any(p.pid in owned_pids for p in line)


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline())[:80]})"
    except psutil.NoSuchProcess:
        return str(process.pid)
