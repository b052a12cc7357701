"""A session whose kernel is killed in the middle of a run."""

from __future__ import annotations

import subprocess
import sys

__all__ = ["SAY_WHEN_IT_TRAINS", "leave_in_a_run"]

SAY_WHEN_IT_TRAINS = """
said = False
for _ in steps:
    if run.view().step >= 3 and not said:
        said = True
        print("training", session.id, flush=True)
    run.requests.alarm.wait(0.02)
"""
"""The end of a driver's script: it follows its run, `steps`."""


def leave_in_a_run(driver: str, *words: str) -> str:
    """Run a driver's script, kill it in the midst of its run, and return the session's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        session_id = process.stdout.readline().split()[1]
        process.kill()
    return session_id
