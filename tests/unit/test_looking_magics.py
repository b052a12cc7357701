"""The magics that look at runs need no engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from dtkit.driver.runs.create import create_run
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Any]:
    """A shell with dtkit loaded and two runs in its configured folder."""
    for name in ("a", "b"):
        run = create_run(tmp_path, "", recipe=Recipe(), options=RunOptions(), ranks=(0,), name=name)
        run.end("finished")
    shell = InteractiveShell.instance(colors="nocolor")
    shell.run_cell("%load_ext dtkit")
    shell.run_line_magic("config", f"DistMagics.runs_dir = {str(tmp_path)!r}")
    yield shell
    shell.run_cell("%unload_ext dtkit")
    InteractiveShell.clear_instance()


def test_runs_are_listed_opened_compared_and_deleted(
    shell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(shell.run_line_magic("dist_runs", "")) == {"a", "b"}
    assert shell.run_line_magic("dist_runs", "a").state == "finished"
    assert shell.run_line_magic("dist_runs", "a b").names == ("a", "b")
    assert len(shell.run_line_magic("dist_runs", f"--dir {tmp_path / 'none'}")) == 0
    shell.run_cell("%dist_runs --delete a")
    assert "deleted: a" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_wrong_name_is_a_usage_error(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not shell.run_cell("%dist_runs --delete").success
    assert "name the runs to delete" in capsys.readouterr().err
    assert not shell.run_cell("%dist_runs c").success
    assert "no run 'c'" in capsys.readouterr().err
