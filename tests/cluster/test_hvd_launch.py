"""Horovod scripts under their launchers: real processes of their own, no notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dtkit
from dtkit import horovod
from dtkit.horovod.launch import main
from dtkit.horovod.launch.workers import STAND_IN

BIN = Path(sys.executable).parent
TRAIN = """
import sys, torch
from torch import nn
import horovod.torch as hvd

hvd.init()
torch.manual_seed(0)
model = nn.Linear(10, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
for step in range(3):
    torch.manual_seed(100 * step + hvd.rank())
    optimizer.zero_grad()
    loss = model(torch.randn(8, 10)).pow(2).mean()
    loss.backward()
    optimizer.step()
weights = hvd.allgather(model.weight.detach())
assert all(torch.equal(row, weights[0]) for row in weights)
sys.stdout.write(f"rank {hvd.rank()}/{hvd.size()} local {hvd.local_rank()}/{hvd.local_size()} "
                 f"loss {hvd.allreduce(loss.detach()).item():.6f} from {hvd.__name__}\\n")
"""

ELASTIC = """
import os, signal, torch
from torch import nn
import horovod.torch as hvd

hvd.init()
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
data = torch.utils.data.TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
sampler = hvd.elastic.ElasticSampler(data)
processed = []

@hvd.elastic.run
def train(state):
    for batch, (x, y) in enumerate(torch.utils.data.DataLoader(data, 2, sampler=sampler)):
        if batch == 2 and state.generation == 0 and hvd.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)   # the rank that holds the negotiation
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        sampler.record_batch(batch, 2)
        state.commit()

state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, generation=0)
state.register_reset_callbacks([lambda: setattr(state, "generation", 1)])
train(state)
left = set(range(24)) - set().union(*hvd.allgather_object(sampler.processed_indices))
print(f"rank {hvd.rank()}/{hvd.size()} left {len(left)}")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The training script, alone in a folder that is the working directory."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where ranks of a host meet
    # As the .pth file of an installed dtkit does it.
    path = [str(Path(dtkit.__file__).parents[1]), str(STAND_IN)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path / "train.py"


def output_of(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(text: str, size: int) -> set[str]:
    """Return the losses that the ranks printed; every rank of that many did."""
    found = re.findall(r"rank (\d+)/(\d+) local (\d+)/\d+ loss ([\d.]+) from dtkit\.horovod", text)
    assert {int(rank) for rank, *_ in found} == set(range(size)), text
    assert {int(local) for *_, local, _ in found} == set(range(size)), text
    return {loss for *_, loss in found}


def test_horovodrun_torchrun_and_one_process_alone(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["-np", "2", "--cycle-time-ms", "5", "--output-filename", "kept",
                 sys.executable, str(script)]) == 0  # fmt: skip
    shown = capfd.readouterr()
    assert "without effect on torch.distributed: --cycle-time-ms" in shown.err
    (loss,) = losses(shown.out, 2)
    assert (script.parent / "kept/rank.1/stdout").read_text() in shown.out.replace(
        "[1]<stdout>:", ""
    )
    torchrun = output_of(BIN / "torchrun", "--nproc-per-node", "2", script)
    assert losses(torchrun, 2) == {loss}
    assert losses(output_of(sys.executable, script), 1) != {loss}


def test_a_timeline_shows_when_each_rank_was_ready(script: Path) -> None:
    words = ["--timeline-filename", "timeline.json", "--timeline-mark-cycles"]
    assert main(["-np", "2", *words, sys.executable, str(script)]) == 0
    events = json.loads((script.parent / "timeline.json").read_text())
    assert "start_time_since_epoch_in_micros" in events[0]["args"]
    pids = {e["args"]["name"]: e["pid"] for e in events[2:] if e.get("name") == "process_name"}
    (pid,) = [pid for name, pid in pids.items() if name.startswith("allreduce.gradients")]
    mine = [e for e in events if e.get("pid") == pid and e["ph"] != "M"]
    spans = [e.get("name") for e in mine if e["ph"] != "X"]
    assert spans == ["NEGOTIATE_ALLREDUCE", None, "ALLREDUCE", None] * 3  # steps
    assert {e["name"] for e in mine if e["ph"] == "X"} == {"0", "1"}
    assert next(e["args"]["dtype"] for e in mine if "args" in e) == "float32, float32"
    assert [e["ts"] for e in mine] == sorted(e["ts"] for e in mine)
    assert any(e["name"] == "CYCLE_START" for e in events if "name" in e)


def test_mpirun_with_four_ranks(script: Path) -> None:
    shown = output_of(
        BIN / "mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "4",
        sys.executable, script,
    )  # fmt: skip
    assert len(losses(shown, 4)) == 1


def test_the_environment_of_srun_is_enough(script: Path) -> None:
    """As srun sets it, for ranks that it counts backwards on the host."""
    common = {**os.environ, "SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
              "SLURM_NODEID": "0", "SLURM_NNODES": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
            env={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(1 - rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = "".join(process.communicate(timeout=250)[0] for process in ranks)
    assert len(losses(shown, 2)) == 1
    assert "rank 0/2 local 1/2" in shown


def test_a_rank_that_fails_ends_the_job_and_is_named(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import sys, torch, horovod.torch as hvd\nhvd.init()\n"
        "if hvd.rank() == 1:\n    sys.exit(3)\nhvd.allreduce(torch.ones(1), name='w')\n"
    )
    assert main(["-np", "2", sys.executable, str(script)]) != 0
    shown = capfd.readouterr().err
    assert "allreduce.w: rank 1 has shut down" in shown
    assert "rank 1 ended with exit code 3" in shown.splitlines()[-1]


def test_a_rank_that_does_not_come_is_named_and_the_wait_ends(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import threading, torch, horovod.torch as hvd\nhvd.init()\n"
        "if hvd.rank() == 1:\n    threading.Event().wait()\n"
        "hvd.allreduce(torch.ones(1), name='w')\n"
    )
    words = ["--stall-check-warning-time-seconds", "0.2",
             "--stall-check-shutdown-time-seconds", "0.6"]  # fmt: skip
    assert main(["-np", "2", *words, sys.executable, str(script)]) == 1
    shown = capfd.readouterr().err
    assert re.search(r"'allreduce.w' has waited 0 s for rank 1; rank 0 submitted it", shown)
    assert "HorovodInternalError" in shown


def test_the_others_go_on_when_a_rank_is_killed(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script.write_text(ELASTIC)
    assert main(["-np", "3", "--min-np", "2", sys.executable, str(script)]) == 0
    shown = capfd.readouterr()
    assert "worker 0 ended; going on with 2" in shown.err
    assert sorted(re.findall(r"rank (\d)/2 left (\d+)", shown.out)) == [("0", "0"), ("1", "0")]


def test_a_function_runs_on_ranks_and_returns_its_results(script: Path) -> None:
    del script

    def work(factor: int) -> tuple[int, float]:
        import horovod.torch as hvd
        import torch

        hvd.init()
        return hvd.rank() * factor, hvd.allreduce(torch.ones(1) * hvd.rank()).item()

    assert horovod.run(work, (10,), num_proc=2) == [(0, 0.5), (10, 0.5)]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-np", "2"], "name what to run"),
        (["python", "x.py"], "say how many ranks"),
        (["-np", "2", "-H", "far:2", "python", "x.py"], "far: dtkit's horovodrun starts ranks on"),
        (["-np", "4", "-H", "localhost:2", "python", "x.py"], "more than the 2 slots"),
        (["-np", "2", "--min-np", "3", "python", "x.py"], "--min-np 3"),
        (["-H", "localhost:two", "python", "x.py"], "localhost: 'two' is no number of slots"),
        (["--hostfile", "/nowhere", "python", "x.py"], "--hostfile: "),
        (["-np", "2", "/nowhere/python", "x.py"], "/nowhere/python cannot be started: No such"),
        (
            ["-np", "2", "--output-filename", "/dev/null", "python", "x.py"],
            "/dev/null/rank.0/stdout cannot be written (Not a directory): give --output-filename",
        ),
    ],
)
def test_a_command_line_that_cannot_be_names_the_fix(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_ranks_go_on_when_their_output_can_no_longer_be_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank.0").mkdir()
    (tmp_path / "rank.0/stdout").symlink_to("/dev/full")
    words = ["-np", "1", "--output-filename", str(tmp_path), sys.executable, "-c"]
    assert main([*words, "for i in range(3000): print(i, 'x' * 100)"]) == 0
    shown = capfd.readouterr()
    assert shown.out.count("[0]<stdout>:") == 3000
    assert shown.err.count("its output is not kept any more: No space left on device") == 1


def test_check_build_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check-build"]) == 0
    shown = capsys.readouterr().out
    assert "[X] PyTorch" in shown
    assert "[X] Gloo" in shown
    assert "[ ] TensorFlow" in shown
