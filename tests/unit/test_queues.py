"""What a job that was submitted waits for, from what Grid Engine's and PBS's qstat print."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import pytest
from ipyparallel.cluster.launcher import (
    LSFEngineSetLauncher,
    PBSEngineSetLauncher,
    SGEEngineSetLauncher,
)

from dtkit.cluster.remote.queues import waiting_words
from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# As SGE 8.1.9 printed it, with fewer spaces.
_RUNS = "      1 0.75000 other  root  r    11/26/2026 19:37:31 all.q@host-a    2\n"
SGE = f"""
job-ID  prior   name   user  state submit/start at     queue           slots ja-task-ID
{"-" * 80}
{_RUNS}      2 0.25000 dtkit  root  {{state:4}} 11/26/2026 19:37:35 all.q@host-b    2 1
"""
SGE_WAITS = "      2 0.00000 dtkit  root  qw   11/26/2026 19:37:35                  2 2\n"
SGE_REASON = """
error reason    1:          11/26/2026 19:38:54 [0:29517]: error: can't open output file "/no/log"
                2:          11/26/2026 19:38:54 [0:29518]: error: can't open output file "/no/log"
"""
# As the qstat of slurm-wlm-torque 22.05.8 printed it.
PBS = """
Job id              Name             Username        Time Use S Queue
------------------- ---------------- --------------- -------- - ---------------
2                   dtkit            root            00:00:00 {state} lab
"""


@pytest.fixture
def qstat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let `qstat` print something, something else when it is asked for reasons, and end."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(text: str, reason: str = "", code: int = 0) -> None:
        script = tmp_path / "qstat"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = -j ] && printf %s {shlex.quote(reason)} '
            f"|| printf %s {shlex.quote(text)}\nexit {code}\n"
        )
        script.chmod(0o755)

    return write


def words(kind: type, folder: Path) -> str:
    launcher = kind(work_dir=str(folder), profile_dir=str(folder))
    launcher.job_id = "2"
    return waiting_words(launcher, lambda: "its last words")


def test_a_grid_engine_job(qstat: Callable[..., None], tmp_path: Path) -> None:
    qstat(SGE.format(state="r"))
    assert words(SGEEngineSetLauncher, tmp_path) == ""
    qstat(SGE.format(state="r") + SGE_WAITS)
    assert words(SGEEngineSetLauncher, tmp_path) == "SGE job 2 waits (qw); ■ takes it back"
    qstat(SGE.format(state="Eqw"), SGE_REASON)
    with pytest.raises(
        StartError, match=r"job 2 is over \(Eqw .*can't open output file.*last words"
    ):
        words(SGEEngineSetLauncher, tmp_path)
    qstat("")
    with pytest.raises(StartError, match=r"SGE job 2 is over \(gone\): its last words"):
        words(SGEEngineSetLauncher, tmp_path)
    qstat("", code=1)  # the queue master does not answer
    assert words(SGEEngineSetLauncher, tmp_path) == "SGE job 2 has not started; ■ takes it back"


def test_a_pbs_job(qstat: Callable[..., None], tmp_path: Path) -> None:
    for state, told in {"R": "", "Q": "PBS job 2 waits (Q); ■ takes it back"}.items():
        qstat(PBS.format(state=state))
        assert words(PBSEngineSetLauncher, tmp_path) == told
    qstat(PBS.format(state="C"))
    with pytest.raises(StartError, match=r"PBS job 2 is over \(C\): its last words"):
        words(PBSEngineSetLauncher, tmp_path)
    qstat("", code=153)
    with pytest.raises(StartError, match=r"PBS job 2 is over \(gone\)"):
        words(PBSEngineSetLauncher, tmp_path)


def test_a_system_that_is_not_asked(tmp_path: Path) -> None:
    assert words(LSFEngineSetLauncher, tmp_path) == "LSF job 2 has not started; ■ takes it back"
