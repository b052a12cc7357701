"""A notebook's cells as a script that torchrun, mpirun and horovodrun start."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Cell", "chosen", "script", "write_script"]

_HEAD = '''"""{name}: exported from a notebook by %dist_export.

Run it on 2 ranks of this machine with any of these:

    torchrun --nproc-per-node 2 {name}
    mpirun -np 2 python {name}
    horovodrun -np 2 python {name}

It needs dtkit and what the cells import. A training cell is made data parallel
as `%%dist_train` made it, and its losses are kept in dtkit_runs/{stem}.
"""

import dtkit.script

# What a cell finds in a notebook: rank, local_rank, world_size, device and dist.
rank, local_rank, world_size, device, dist = dtkit.script.join()
'''
_IN_SCRIPTS = {"manual", "batch", "compress"}
"""The fields of `Recipe` that `dtkit.script` carries out."""
_MAGIC = re.compile(r"^(\s*)([%!])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell as it was run.

    Attributes:
        number: what stands before it in the notebook: In [number].
        text: its source, the magic's line first.
    """

    number: int
    text: str

    @property
    def magic(self) -> str:
        """`dist`, `dist_train`, or empty: another cell."""
        found = re.match(r"%%(dist_train|dist)\b", self.text)
        return found[1] if found else ""

    @property
    def line(self) -> str:
        """What stands after the magic's name."""
        return self.text.split("\n", 1)[0].partition(" ")[2].strip() if self.magic else ""

    @property
    def body(self) -> str:
        """The cell without the magic's line, and with other magics as comments.

        Raises:
            InvalidInputError: it is no Python that a script can hold.
        """
        body = self.text.partition("\n")[2] if self.magic else self.text
        body = _without_magics(body.strip("\n"))
        try:
            ast.parse(body)
        except SyntaxError as error:
            msg = (
                f"In [{self.number}], line {error.lineno}: {error.msg}. A script holds plain "
                "Python: change the cell and run it again, or name the other cells"
            )
            raise InvalidInputError(msg) from None
        return body


def chosen(cells: Sequence[Cell], numbers: Sequence[int] = ()) -> list[Cell]:
    """Return the cells of these numbers, in their order.

    Without numbers: the last training cell, and the `%%dist` cells run before it,
    of equal ones the last.

    Raises:
        InvalidInputError: there is no such cell, or no training cell.
    """
    by_number = {cell.number: cell for cell in cells}
    if numbers:
        missing = [n for n in numbers if n not in by_number]
        if missing:
            msg = f"no cell In [{missing[0]}] was run in this notebook"
            raise InvalidInputError(msg)
        return [by_number[n] for n in numbers]
    training = [cell for cell in cells if cell.magic == "dist_train"]
    if not training:
        msg = "no %%dist_train cell was run in this notebook: run one, or name cells by number"
        raise InvalidInputError(msg)
    last = training[-1]
    before = {c.text: c for c in cells if c.magic == "dist" and c.number < last.number}
    return [*sorted(before.values(), key=lambda c: c.number), last]


def script(cells: Sequence[Cell], recipes: Mapping[int, Recipe], name: str) -> str:
    """Return the script.

    Args:
        cells: in their order.
        recipes: of the training cells, by number.
        name: the script's file name.

    Raises:
        InvalidInputError: a cell cannot be in a script.
    """
    parts = [_HEAD.format(name=name, stem=Path(name).stem)]
    for cell in cells:
        title = f"# In [{cell.number}]"
        if cell.magic:
            title = f"{title}: %%{cell.magic} {cell.line}".rstrip()
        if cell.magic == "dist_train":
            arguments = _arguments(recipes[cell.number])
            parts.append(
                f"{title}\ntraining = dtkit.script.begin({arguments})\n\n{cell.body}\n\n"
                "training.end()\n"
            )
        else:
            parts.append(f"{title}\n{cell.body}\n")
    return "\n".join(parts)


def write_script(path: str | Path, cells: Sequence[Cell], recipes: Mapping[int, Recipe]) -> Path:
    """Write cells to a script, and return its path.

    Raises:
        InvalidInputError: it is no Python file or cannot be written, or a cell cannot be in one.
    """
    path = Path(path)
    if path.suffix != ".py":
        msg = f"{path}: name a Python file, such as {path.with_suffix('.py')}"
        raise InvalidInputError(msg)
    text = script(cells, recipes, path.name)
    try:
        path.write_text(text)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}"
        raise InvalidInputError(msg) from None
    return path


def _arguments(recipe: Recipe) -> str:
    plain = Recipe().to_dict()
    given = {k: v for k, v in recipe.to_dict().items() if v != plain[k]}
    beyond = sorted(given.keys() - _IN_SCRIPTS)
    if beyond:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in beyond)
        msg = f"a script does not train with {flags}: write it into the cell, and run that"
        raise InvalidInputError(msg)
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _without_magics(body: str) -> str:
    """Return the body with the lines of magics and shell commands as comments."""
    try:
        ast.parse(body)
    except SyntaxError:
        return _MAGIC.sub(r"\1# \2", body)
    return body
