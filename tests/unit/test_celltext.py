"""The text of a cell that is no run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.driver.runs.celloutput import CellOutput
from dtkit.views.celltext import CellText

if TYPE_CHECKING:
    import pytest


def test_of_a_huge_result_the_beginning_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output = CellOutput((0, 1))
    output.results = {0: "y" * 5_000_000, 1: "short"}
    CellText(output, 2).finish()
    shown, short = capsys.readouterr().out.splitlines()
    assert shown.startswith("rank 0: yyy")
    assert shown.endswith("y… and 4,980,000 characters more")
    assert short == "rank 1: short"
