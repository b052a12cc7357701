"""The magic that makes a script of the notebook's cells."""

from __future__ import annotations

from IPython.core.error import UsageError
from IPython.core.magic import line_magic, magics_class

from dtkit.export import Cell, chosen, write_script
from dtkit.magics.arguments import Parser, usage_errors
from dtkit.magics.base import DtkitMagics, say
from dtkit.magics.lines import parse_train, recipe_of

__all__ = ["DistExportMagics"]


@magics_class
class DistExportMagics(DtkitMagics):
    """The magic that exports."""

    @line_magic
    @usage_errors
    def dist_export(self, line: str) -> None:
        """Write cells to a script that torchrun, mpirun and horovodrun run."""
        args = EXPORT.parse(line)
        cells = chosen(self._history(), args.cells)
        recipes = {
            cell.number: recipe_of(parse_train(cell.line, is_cell=True))
            for cell in cells
            if cell.magic == "dist_train"
        }
        if not recipes:
            msg = "%dist_export: none of these cells is a %%dist_train cell"
            raise UsageError(msg)
        path = write_script(args.file, cells, recipes)
        listed = ", ".join(f"In [{cell.number}]" for cell in cells)
        say(f"{path}: {listed}\nrun it with: torchrun --nproc-per-node 2 {path}")

    def _history(self) -> list[Cell]:
        """Return the cells that were run, the newest last."""
        assert self.shell is not None  # noqa: S101  the magics were registered with one
        history = self.shell.history_manager
        raw = [] if history is None else history.input_hist_raw
        return [Cell(number, text) for number, text in enumerate(raw) if text.strip()]


def _export() -> Parser:
    parser = Parser("%dist_export", "Write cells to a script that torchrun and mpirun run.")
    parser.add_argument("file", metavar="FILE.py")
    parser.add_argument(
        "cells", nargs="*", type=int, metavar="N",
        help="cells by the number in In [N] (default: the last %%%%dist_train cell, and the "
             "%%%%dist cells before it)",
    )  # fmt: skip
    return parser


EXPORT = _export()
