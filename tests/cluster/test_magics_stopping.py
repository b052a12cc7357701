"""What a notebook's user does to a cell that is running: Interrupt, stop, steer, rebuild."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from IPython.core.completer import provisionalcompleter
from patience import wait_until
from shells import TRAINING, Notebook, close_shell, new_shell, press_interrupt_when_busy

import dtkit
from dtkit.driver.registry import current_session
from dtkit.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shell(session2: dtkit.Session) -> Iterator[Any]:  # noqa: ARG001  it is the open one
    """A shell beside a session of two ranks."""
    shell = new_shell()
    yield shell
    close_shell(shell)


def test_interrupt_stops_a_run_between_two_steps(notebook: Notebook) -> None:
    session = current_session()
    presser = press_interrupt_when_busy(session)
    text = notebook.run("%%dist_train\n" + TRAINING.replace("EPOCHS", "100_000"), fails=True)
    presser.join()
    run = dtkit.last_run
    assert run is not None
    assert run.state == "stopped"
    assert "Interrupted: the ranks have stopped and keep their state" in text
    assert notebook.run("%dist num_steps").startswith("all ranks: ")
    weights = notebook.run("%dist model.weight.sum().item()")
    assert weights.startswith("all ranks: ")
    notebook.run("%%dist_train\n" + TRAINING.replace("EPOCHS", "1"))


def test_a_run_in_the_background_is_stopped_by_the_magic(notebook: Notebook) -> None:
    begun = notebook.run("%%dist_train --background\n" + TRAINING.replace("EPOCHS", "100_000"))
    assert "running" not in begun.split("\n")[-1]
    run = dtkit.last_run
    assert run is not None
    assert run.state == "running"
    text = notebook.run("%dist rank", fails=True)
    assert "busy with another cell" in text
    wait_until(lambda: run.view().step >= 5, "five steps")
    assert "stopping after the step" in notebook.run("%dist_stop")
    run.wait(timeout_s=60)
    assert run.state == "stopped"
    assert notebook.run("%dist num_steps > 4") == "all ranks: True\n"


def elsewhere(line: str) -> str:
    """Run a magic's line in another kernel, without engines; returns what it printed."""
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S; import dtkit; s = S(); "
        f"dtkit.load_ipython_extension(s); s.run_cell({line!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_a_run_in_the_background_is_steered_by_the_magic(notebook: Notebook) -> None:
    cell = TRAINING.replace("EPOCHS", "100_000").replace(
        "        loss.backward()", "        loss = loss * dtkit.control('scale', 1, low=0)\n"
        "        loss.backward()",
    )  # fmt: skip
    notebook.run(f"%%dist_train --background\nimport dtkit\n{cell}")
    run = dtkit.last_run
    assert run is not None
    wait_until(lambda: run.view().step and "scale" in run.controls, "the control")
    assert re.search(r"lr_factor 0.5 from step \d+ on", notebook.run("%dist_control lr_factor 0.5"))
    assert re.search(r"lr_factor 0.2 from step \d+ on", notebook.run("%dist_control lr 0.01"))
    shown = notebook.run("print(get_ipython().run_line_magic('dist_control', ''))")
    assert re.search(r"lr_factor +0.2 +a number from 0 +0.5 from step \d+ on; 0.2", shown)
    assert re.search(r"scale +1 +a whole number from 0", shown)
    said = notebook.run("%dist_control scale 0.5", fails=True)
    assert "control 'scale': '0.5' is not what it takes: a whole number from 0" in said
    said = notebook.run("%dist_control scal 2", fails=True)
    assert "no control 'scal'; did you mean scale?" in said
    with provisionalcompleter():
        line = "%dist_control sc"
        found = [c.text for c in notebook.shell.Completer.completions(line, len(line))]
    assert found == ["scale"]
    assert "asked the notebook that drives" in elsewhere(
        f"%dist_control scale 3 --dir {run.dir.parent}"
    )
    wait_until(lambda: len(run.changes) == 3, lambda: run.changes)
    assert run.changes[2].values == {"scale": 3}
    notebook.run("%dist_stop")
    run.wait(timeout_s=60)
    said = notebook.run("%dist_control scale 2", fails=True)
    assert "no run goes on" in said


def test_a_failure_in_the_background_is_kept(notebook: Notebook) -> None:
    notebook.run("%%dist_train --background\n1 / 0")
    run = dtkit.last_run
    assert run is not None
    with pytest.raises(RankError, match="division by zero"):
        run.wait(timeout_s=60)
    assert run.state == "failed"


def test_interrupt_twice_frees_a_collective(notebook: Notebook) -> None:
    notebook.run("%%dist\nkept = 7")
    presser = press_interrupt_when_busy(current_session(), times=2)
    # Each waits for the other to send: nothing but a cut ends that.
    cell = "%%dist\nimport torch\ndist.recv(torch.ones(1), src=1 - rank)"
    text = notebook.run(cell, fails=True)
    presser.join()
    assert "Interrupted" in text
    assert notebook.run("%dist kept") == "all ranks: 7\n"
    assert (
        notebook.run("%%dist\nt = torch.ones(1)\ndist.all_reduce(t)\nt.item()")
        == "all ranks: 2.0\n"
    )


def test_the_group_can_be_rebuilt_by_hand(notebook: Notebook) -> None:
    notebook.run("%%dist\nkept = 9")
    assert "group rebuilt; state kept" in notebook.run("%dist_reset")
    assert notebook.run("%dist kept") == "all ranks: 9\n"
    text = notebook.run("%dist_restart", fails=True)
    assert "every engine lives; name the rank to replace" in text


def test_stop_now_ends_a_run_that_is_stuck(notebook: Notebook) -> None:
    notebook.run("%%dist_train --background\nimport torch\ndist.recv(torch.ones(1), src=1 - rank)")
    run = dtkit.last_run
    assert run is not None
    assert "stopping now" in notebook.run("%dist_stop --now")
    run.wait(timeout_s=60)
    assert run.state == "stopped"
    assert notebook.run("%dist rank") == "rank 0: 0\nrank 1: 1\n"


def test_ranks_are_let_go_when_nobody_drives_a_cell_on(notebook: Notebook) -> None:
    session = current_session()
    assert session is not None
    _, _, steps = session.running("import time\nwhile True: time.sleep(0.1)")
    next(steps)
    del steps  # as when the loop that drives it raises
    assert not session.is_busy
    assert notebook.run("%dist world_size") == "all ranks: 2\n"
