"""The script that a notebook's cells become."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from dtkit.errors import InvalidInputError
from dtkit.export import Cell, chosen, script, write_script
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

SETUP = Cell(2, "%%dist\nimport torch\n%matplotlib inline\n!ls data\nX = 1")
FIRST = Cell(3, "%%dist_train\nloss = 1")
PLAIN = Cell(4, "print('on the driver')")
AGAIN = Cell(5, "%%dist\nimport torch\n%matplotlib inline\n!ls data\nX = 1")
LAST = Cell(6, '%%dist_train --batch global --compress fp16\n"""text\n  more"""\nloss = X')
CELLS = [SETUP, FIRST, PLAIN, AGAIN, LAST]


def test_the_last_training_cell_and_what_it_needs_are_chosen() -> None:
    assert [cell.number for cell in chosen(CELLS)] == [5, 6]


def test_cells_can_be_named_in_any_order() -> None:
    assert [cell.number for cell in chosen(CELLS, [4, 3])] == [4, 3]


def test_a_script_is_readable_python_with_the_recipe_of_each_cell() -> None:
    text = script([SETUP, LAST], {6: Recipe(batch="global", compress="fp16")}, "train.py")
    ast.parse(text)
    assert "torchrun --nproc-per-node 2 train.py" in text
    assert "# In [2]: %%dist\nimport torch\n# %matplotlib inline\n# !ls data\nX = 1\n" in text
    assert "training = dtkit.script.begin(batch='global', compress='fp16')" in text
    assert '"""text\n  more"""\nloss = X\n\ntraining.end()' in text


def test_a_plain_recipe_has_no_arguments() -> None:
    assert "dtkit.script.begin()\n" in script([FIRST], {3: Recipe()}, "train.py")


def test_a_flag_that_a_script_does_not_carry_out_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="does not train with --batch-size"):
        script([FIRST], {3: Recipe(batch_size=8)}, "train.py")


@pytest.mark.parametrize(
    ("numbers", "cells", "text"),
    [
        ([9], CELLS, r"no cell In \[9\]"),
        ([], [SETUP, PLAIN], "no %%dist_train cell was run"),
    ],
)
def test_cells_that_are_not_there_are_named(
    numbers: list[int], cells: list[Cell], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=text):
        chosen(cells, numbers)


def test_what_is_no_python_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    cell = Cell(7, "%%dist_train\nx = = 1")
    with pytest.raises(InvalidInputError, match=r"In \[7\], line 1"):
        write_script(tmp_path / "train.py", [cell], {7: Recipe()})
    with pytest.raises(InvalidInputError, match=r"name a Python file, such as .*train\.py"):
        write_script(tmp_path / "train.txt", [FIRST], {3: Recipe()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInputError, match=r"train\.py cannot be written: No such file"):
        write_script(tmp_path / "nowhere" / "train.py", [FIRST], {3: Recipe()})
