"""The magics in a real IPython shell, on two real engines: cells, scripts and objects."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
from IPython.core.completer import provisionalcompleter
from patience import wait_until
from shells import TRAINING, Notebook, close_shell, new_shell, press_interrupt_when_busy

import dtkit
from dtkit.driver.registry import current_session
from dtkit.guard.processes import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from IPython.core.interactiveshell import InteractiveShell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, owned_pids: set[int]) -> Iterator[Any]:
    """A shell with dtkit loaded and two ranks; nothing of them is left afterwards."""
    runs = tmp_path_factory.mktemp("runs")
    shell = new_shell()
    shell.run_line_magic("config", f"DistMagics.runs_dir = {str(runs)!r}")
    # ipykernel captures descriptors 1 and 2 of an engine only when this is not set.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    shell.run_line_magic("dist_init", "-n 2")
    session = current_session()
    assert session is not None
    pids = set(session.pids())
    owned_pids |= pids
    yield shell
    shell.run_cell("%dist_shutdown")
    close_shell(shell)
    owned_pids -= pids
    assert current_session() is None
    assert not [pid for pid in pids if Identity.of(pid)]


def offered(shell: InteractiveShell, text: str) -> list[str]:
    """Return what is offered where the `|` is."""
    with provisionalcompleter():
        found = shell.Completer.completions(text.replace("|", ""), text.index("|"))
        return [one.text for one in found]


def test_names_on_the_ranks_are_offered_also_while_they_are_busy(notebook: Notebook) -> None:
    notebook.run(
        "%%dist\n"
        "import threading, torch\n"
        "gate, net = threading.Event(), torch.nn.Sequential(torch.nn.Linear(2, 3))\n"
        "class Trap:\n"
        "    def __init__(self): self.inner_value = 1\n"
        "    @property\n"
        "    def inner_trap(self): raise SystemExit\n"
        "trapped = Trap()"
    )

    def ask() -> None:
        asked["pull"] = offered(notebook.shell, "%dist_pull tra|")
        asked["layer"] = offered(notebook.shell, "%%dist\nprint(net._modules, net.train|)")
        asked["trap"] = offered(notebook.shell, "%dist trapped.inner_|")
        asked["through"] = offered(notebook.shell, "%%dist\ntrapped.inner_trap.re|")
        asked["given"] = offered(notebook.shell, "%%dist_train\nworld_s|")
        asked["module"] = offered(notebook.shell, "%dist torch.nn.functional.cross_ent|")

    asked: dict[str, list[str]] = {}
    ask()
    idle, asked = asked, {}
    assert idle == {
        "pull": ["trapped"],
        "layer": ["train", "training"],
        "trap": ["inner_trap", "inner_value"],
        "through": [],
        "given": ["world_size"],
        "module": ["cross_entropy"],
    }
    session = current_session()
    assert session is not None
    notebook.run("%%dist_train --manual --background\nassert gate.wait(60)")
    try:
        wait_until(lambda: all(rank.state == "busy" for rank in session.status()), session.status)
        ask()
    finally:
        notebook.run("%dist_stop --now")
        assert dtkit.last_run is not None
        with contextlib.suppress(Exception):
            dtkit.last_run.wait(timeout_s=60)
    assert asked == idle


def test_an_expression_shows_each_value_and_equal_ones_once(notebook: Notebook) -> None:
    assert notebook.run("%dist rank * 10") == "rank 0: 0\nrank 1: 10\n"
    assert notebook.run("%dist world_size, str(device)") == "all ranks: (2, 'cpu')\n"
    assert notebook.run("%dist -r 1 rank") == "rank 1: 1\n"


def test_names_live_on_between_cells_and_only_where_they_were_made(notebook: Notebook) -> None:
    notebook.run("%%dist -r 0\nonly_here = 5")
    assert "rank 0: True" in notebook.run("%dist 'only_here' in globals()")
    assert "rank 1: False" in notebook.run("%dist 'only_here' in globals()")
    assert "only_here" not in notebook.shell.user_ns


def test_a_cell_runs_under_ipython(notebook: Notebook) -> None:
    cell = """%%dist
import asyncio, inspect, pickle
class Thing:
    pass
def source():
    return 1
await asyncio.sleep(0)
assert 'return 1' in inspect.getsource(source)
assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
%cd -q .
!echo from a child process
print('from Python')
"""
    text = notebook.run(cell)
    assert sorted(text.split("\n")[:-1]) == ["from Python", "from a child process"]


def test_carriage_returns_act_and_stderr_is_shown(notebook: Notebook) -> None:
    cell = """%%dist
import os, sys
for i in range(3):
    print(f'\\r{i}', end='', flush=True)
print(flush=True)
print('to stderr', file=sys.stderr, flush=True)
os.write(1, b'from the descriptor\\n');
"""
    text = notebook.run(cell)
    assert text.splitlines()[0] == "2"
    assert "to stderr" in text
    assert "from the descriptor" in text


def test_output_that_differs_stays_apart(notebook: Notebook) -> None:
    text = notebook.run("%%dist\nprint('rank', rank)")
    assert text == "── rank 0 ──\nrank 0\n── rank 1 ──\nrank 1\n"


def test_a_failing_cell_fails_with_its_own_line(notebook: Notebook) -> None:
    text = notebook.run("%%dist\nx = 1\n\n1 / 0", fails=True)
    assert "ranks 0, 1" in text
    assert "line 4" in text
    assert text.count("ZeroDivisionError: division by zero") == 1
    assert "ipyparallel" not in text


def test_one_failing_rank_frees_the_other_and_state_is_kept(notebook: Notebook) -> None:
    notebook.run("%%dist\nkept = rank + 1")
    cell = """%%dist
import torch
if rank == 1:
    raise ValueError('boom')
dist.all_reduce(torch.ones(1))
"""
    text = notebook.run(cell, fails=True)
    assert "ValueError: boom" in text
    assert (
        "rank 0 was in all_reduce (cell line 5) and was released; group rebuilt; state kept" in text
    )
    assert notebook.run("%dist kept") == "rank 0: 1\nrank 1: 2\n"
    summed = notebook.run("%%dist\nt = torch.ones(1)\ndist.all_reduce(t)\nt.item()")
    assert summed == "all ranks: 2.0\n"


def test_a_training_cell_leaves_a_run(notebook: Notebook) -> None:
    text = notebook.run(
        "%%dist_train --batch global --name first\n" + TRAINING.replace("EPOCHS", "3")
    )
    run = dtkit.last_run
    assert run is not None
    assert (run.name, run.state, run.error) == ("first", "finished", None)
    assert run.history.num_steps == 48
    assert run.history["loss"][-1] < run.history["loss"][0] / 10
    assert "48/48" in text
    assert "1 model broadcast, 1 DataLoader sharded (global batch 16 = 2 × 8)" in text
    assert {path.name for path in run.dir.iterdir()} >= {"run.json", "cell.py", "rank-0.jsonl"}


def test_a_script_trains_like_a_cell(notebook: Notebook, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    ending = "import sys\nassert __name__ == '__main__'\nprint(sys.argv[1:])\n"
    script.write_text(TRAINING.replace("EPOCHS", "1") + ending)
    text = notebook.run(f"%dist_train --batch global {script} --lr 0.1")
    assert "['--lr', '0.1']" in text
    assert notebook.run("%dist num_steps") == "all ranks: 16\n"


def test_a_failing_script_fails_the_cell(notebook: Notebook, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("def main():\n    raise KeyError('lost')\nmain()\n")
    text = notebook.run(f"%dist_train {script}", fails=True)
    assert "KeyError: 'lost'" in text
    assert "broken.py:2" in text


def test_an_engine_that_answers_nothing_is_replaced_at_the_third_press(
    notebook: Notebook, owned_pids: set[int]
) -> None:
    session = current_session()
    assert session is not None
    notebook.run("%%dist\nkept = 8")
    presser = press_interrupt_when_busy(session, times=5)
    cell = """%%dist
import time
while rank == 1:
    try:
        time.sleep(9)
    except KeyboardInterrupt:
        pass
dist.barrier()
"""
    text = notebook.run(cell, fails=True)
    presser.join()
    owned_pids |= set(session.pids())
    assert "Interrupted: " in text
    assert "rank 1: new engine, no names yet" in text
    assert notebook.run("%dist -r 0 kept") == "rank 0: 8\n"
    assert notebook.run("%dist rank") == "rank 0: 0\nrank 1: 1\n"
    assert "no name" not in notebook.run("%dist_restart 1 --refill")
    owned_pids |= set(session.pids())
    assert notebook.run("%dist kept") == "all ranks: 8\n"


def test_objects_travel_both_ways(notebook: Notebook) -> None:
    notebook.shell.user_ns["table"] = {"a": [1, 2]}
    assert "table: " in notebook.run("%dist_push table")
    assert notebook.run("%dist table") == "all ranks: {'a': [1, 2]}\n"
    cell = """%%dist
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.layer(x)
net = Net()
mine = torch.full((2,), float(rank))
"""
    notebook.run(cell)
    notebook.run("%dist_pull net --as pulled")
    pulled = notebook.shell.user_ns["pulled"]
    assert type(pulled).__name__ == "Net"
    assert tuple(next(pulled.parameters()).shape) == (2, 3)
    notebook.run("%dist_pull mine --rank 1")
    assert notebook.shell.user_ns["mine"].tolist() == [1.0, 1.0]
    notebook.run("%dist_pull net.layer.bias --as bias")
    assert notebook.shell.user_ns["bias"].shape == (2,)


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("%dist_pull nothing_here", "no 'nothing_here' on this rank"),
        ("%dist_pull model --rank 7", "0 to 1"),
        ("%dist_pull a b --as c", "one object"),
        ("%dist_push not_there", "no not_there in the notebook"),
        ("%dist_init -n 4", "%dist_shutdown"),
        ("%dist_init --devices 0", "--devices cpu"),
        ("%dist_train missing.py", "two percent signs"),
        ("%%dist_train --ranks 5\nx = 1", "0 to 1"),
        ("%%dist_train --name ../x\nx = 1", "letters, digits"),
        ("%%dist_train\n  \n", "empty"),
        ("%%dist_train --batch global --manual\nx = 1", "use one"),
        ("%dist_stop", "nothing is running"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error_that_names_the_fix(
    notebook: Notebook, line: str, fix: str
) -> None:
    if line.startswith("%dist_init --devices"):
        # With a session open a second %dist_init changes nothing, whatever it asks for.
        assert "running: 2 ranks on CPU over gloo; nothing was changed" in notebook.run(line)
        return
    text = notebook.run(line, fails=True)
    assert text.startswith("UsageError: ")
    assert fix in text


def test_status_and_a_second_init_change_nothing(notebook: Notebook) -> None:
    text = notebook.run("%dist_status")
    assert "2 ranks on CPU over gloo" in text
    assert text.count("idle") == 2
    assert "running: 2 ranks on CPU over gloo" in notebook.run("%dist_init -n 2")


def test_figures_come_as_figures(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("dtkit.views.celltext.display", lambda data, **_options: shown.append(data))
    cell = "%%dist\nimport matplotlib.pyplot as plt\nplt.plot([1, 2, rank])\nplt.show()"
    notebook.run(cell)
    assert sum("image/png" in data for data in shown) == 2


def test_a_run_on_one_rank_leaves_the_other_alone(notebook: Notebook) -> None:
    notebook.run("%%dist\nnum_steps = -1")
    notebook.run("%%dist_train --ranks 1\n" + TRAINING.replace("EPOCHS", "1"))
    assert notebook.run("%dist num_steps") == "rank 0: -1\nrank 1: 16\n"
