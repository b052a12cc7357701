"""dtkit as it is installed: the wheel in an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import horovod.torch as hvd
hvd.init()
sys.stdout.write(f"{hvd.__name__} {hvd.rank()}/{hvd.size()}\\n")
"""
SESSION = """
import dtkit
print(dtkit.__file__)
with dtkit.Session.start(2) as session:
    run = session.train(
        "import torch\\n"
        "import horovod.torch as hvd\\n"
        "w = torch.ones(3, requires_grad=True)\\n"
        "optimizer = torch.optim.SGD([w], lr=0.1)\\n"
        "for _ in range(3):\\n"
        "    optimizer.zero_grad()\\n"
        "    (w * w).sum().backward()\\n"
        "    optimizer.step()\\n"
    )
    print(len(run.history["loss"]), session.execute("hvd.__name__").results)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what dtkit needs comes from the tests' own environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (wheel,) = folder.glob("dtkit-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file, whose own .pth files (the checkout's) are not read.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    return python


def run(folder: Path, *command: str | Path) -> str:
    """Run a command outside of the checkout; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_session_of_the_wheel_trains(installed: Path, tmp_path: Path) -> None:
    lines = run(tmp_path, installed, "-c", SESSION).splitlines()
    assert lines[0].startswith(str(installed.parents[1]))
    assert lines[-1].startswith("3 ")
    assert lines[-1].count("dtkit.horovod.torch") == 2


@pytest.mark.parametrize("command", ["horovodrun", "dtkit-horovodrun"])
def test_its_console_scripts_start_ranks(installed: Path, tmp_path: Path, command: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    said = run(tmp_path, installed.with_name(command), "-np", "2", installed, script)
    for rank in (0, 1):
        assert f"dtkit.horovod.torch {rank}/2" in said
