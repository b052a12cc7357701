"""The guards of tests/conftest.py fail the tests that they are there for, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text()

FINE = """
import threading

def test_it(monkeypatch):
    monkeypatch.setenv("DTKIT_LEAK", "1")
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
"""
ENVIRONMENT = """
import os

def test_it():
    os.environ["DTKIT_LEAK"] = "1"
"""
# It outlives the guard's patience and then ends, for the sake of the outer guard.
THREAD = """
import threading

def test_it():
    threading.Thread(target=threading.Event().wait, args=(1.0,), name="left").start()
"""
PROCESS = """
import subprocess, sys

def test_it(owned_pids):
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
"""
OWNED_PROCESS = """
import subprocess, sys
import pytest

@pytest.fixture(scope="module")
def start(owned_pids):
    children = []
    def start():
        children.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1))
        owned_pids.add(children[-1].pid)
    yield start
    for child in children:
        child.communicate(b"")
        owned_pids.discard(child.pid)

def test_it(start):
    start()
"""


def run(pytester: pytest.Pytester, test: str) -> pytest.RunResult:
    pytester.makeconftest(CONFTEST.replace("GRACE_S = 5.0", "GRACE_S = 0.1"))
    pytester.makepyfile(test)
    # The leaked Popen object says so when it is collected; the guard is what is tested here.
    return pytester.runpytest("-W", "ignore::ResourceWarning")


@pytest.mark.parametrize("test", [FINE, OWNED_PROCESS], ids=["clean", "owned"])
def test_nothing_is_said_of_a_clean_test(pytester: pytest.Pytester, test: str) -> None:
    run(pytester, test).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        pytest.param(ENVIRONMENT, "environment variables changed: DTKIT_LEAK", id="environment"),
        pytest.param(THREAD, "threads left running: left", id="thread"),
        pytest.param(PROCESS, "processes left running: *pause()*", id="process"),
    ],
)
def test_a_leak_is_an_error(pytester: pytest.Pytester, test: str, message: str) -> None:
    result = run(pytester, test)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"*{message}*"])
