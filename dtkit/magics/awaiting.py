"""Cells that await: so that the kernel serves clicks while the ranks work.

An ordinary cell magic blocks the kernel and the buttons under it until it ends.
A cell that awaits does not. So a cell that begins with one of our magics
is rewritten, before IPython looks at it, to `await` the magic's own coroutine.
Where that does not happen (a nested call, `%autoawait off`) the magic blocks,
and works all the same.
"""

from __future__ import annotations

__all__ = ["AWAIT_NAME", "CELL_MAGICS", "rewrite"]

AWAIT_NAME = "dtkit_run_cell"
CELL_MAGICS = ("dist_train", "dist", "dist_sweep", "dist_tune")


def rewrite(lines: list[str]) -> list[str]:
    """Rewrite a cell of ours to await its magic; leave every other cell as it is."""
    if not lines or not lines[0].startswith("%%"):
        return lines
    name, _, arguments = lines[0][2:].rstrip().partition(" ")
    if name not in CELL_MAGICS or arguments.endswith("?") or name.endswith("?"):
        return lines
    body = "".join(lines[1:])
    return [f"await get_ipython().{AWAIT_NAME}({name!r}, {arguments.strip()!r}, {body!r})\n"]
