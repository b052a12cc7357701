"""Which module `import horovod` gives: in processes of their own, since imports last."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dtkit

STAND_IN = Path(dtkit.__file__).parent / "horovod/_path"


def run(code: str, *paths: Path) -> str:
    """Run code in a fresh Python with folders after this one's own on the path."""
    path = os.pathsep.join(map(str, [Path(dtkit.__file__).parents[1], *paths]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of the path with a Horovod that is not ours."""
    for folder in ("horovod", "horovod/torch"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("origin = 'installed'\n")
    return tmp_path


ORIGIN = "import horovod.torch as hvd; print(getattr(hvd, 'origin', hvd.__name__))"
IS_OURS = "import horovod.common.exceptions as e; print(e.__name__)"


def test_the_stand_in_gives_ours_also_for_what_lies_below() -> None:
    assert run(IS_OURS, STAND_IN) == "dtkit.horovod.errors"


def test_an_installed_horovod_comes_before_the_stand_in(installed: Path) -> None:
    assert run(ORIGIN, installed, STAND_IN) == "installed"


def test_an_installed_horovod_comes_before_the_finder(installed: Path) -> None:
    code = f"from dtkit.horovod import alias; alias.install(); {ORIGIN}"
    assert run(code, installed) == "installed"


def test_the_finder_gives_ours_where_there_is_none() -> None:
    assert run(f"from dtkit.horovod import alias; alias.install(); {IS_OURS}") == (
        "dtkit.horovod.errors"
    )


def test_force_comes_before_an_installed_one_and_back(installed: Path) -> None:
    code = f"""
import horovod.torch
from dtkit.horovod import alias
alias.install(is_forced=True)
{IS_OURS}
alias.install()
{ORIGIN}
"""
    assert run(code, installed).split() == ["dtkit.horovod.errors", "installed"]


@pytest.mark.parametrize("name", ["horovod.tensorflow", "horovod.keras", "horovod.mxnet"])
def test_other_frameworks_are_named_as_missing(name: str) -> None:
    code = f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)"
    assert "dtkit has Horovod's interface for torch only" in run(code, STAND_IN)


def test_an_installation_puts_the_stand_in_on_the_path() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    ((source, target),) = wheel["force-include"].items()
    assert target == "dtkit_horovod.pth"  # beside the package: its line counts from there
    assert (root / (root / source).read_text().strip() / "horovod/__init__.py").is_file()
    assert (root / source).read_text().strip() in wheel["dev-mode-dirs"]
