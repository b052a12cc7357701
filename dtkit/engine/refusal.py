"""What fails before a cell fails the cell: IPython would print it, and run the cell anyway."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["or_refuse", "readmit"]

# Any, below: IPython's shell and results carry no types.


def or_refuse(prepare: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return a method for IPython's `pre_run_cell` whose error becomes the cell's own.

    A rank whose preparation was interrupted, or waited for another in vain, would
    go on into the cell as if nothing had happened, counted as failed already.
    """

    @wraps(prepare)
    def prepared(self: Any, info: Any) -> None:
        try:
            prepare(self, info)
        except BaseException as error:  # noqa: BLE001  raised where errors of cells are
            _refuse(current_shell(), error)

    return prepared


def readmit() -> None:
    """Let cells run again; harmless if none was refused."""
    vars(current_shell()).pop("run_ast_nodes", None)


def _refuse(shell: Any, error: BaseException) -> None:
    async def raise_instead(*_nodes: Any, result: Any, **_how: Any) -> bool:
        readmit()
        result.error_in_exec = error
        shell.showtraceback((type(error), error, error.__traceback__))
        return True

    shell.run_ast_nodes = raise_instead
