"""Execute a notebook and write it, with its outputs, as .ipynb and .html.

make demo runs: python tools/build_notebook.py notebooks/01_first_run.ipynb --output-dir build
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbformat import NotebookNode

CELL_TIMEOUT_S = 600


def execute(notebook: NotebookNode, working_dir: Path) -> None:
    """Run all cells in a fresh kernel; the outputs go into `notebook`.

    Raises:
        CellExecutionError: a cell raised; the text shows the cell and its traceback.
        CellTimeoutError: a cell ran longer than `CELL_TIMEOUT_S`.
        DeadKernelError: the kernel ended before the notebook did.
    """
    with tempfile.TemporaryDirectory(prefix="dtkit-") as folder:
        # Sockets that only this user can reach, in a folder whose name is short enough for them.
        kernel = {"transport": "ipc", "connection_file": str(Path(folder) / "kernel.json")}
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            # A reader has no live widgets, only the static outputs that replace them.
            store_widget_state=False,
            resources={"metadata": {"path": str(working_dir)}},
            config=Config({"KernelManager": kernel}),
        ).execute()


def write(notebook: NotebookNode, name: str, output_dir: Path) -> Path:
    """Write `name`.ipynb and `name`.html and return the path of the latter."""
    nbformat.write(notebook, output_dir / f"{name}.ipynb")
    html, _ = HTMLExporter().from_notebook_node(notebook)
    page = output_dir / f"{name}.html"
    page.write_text(html, encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Build the notebook that the command line names; 0 when every cell succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("build"))
    options = parser.parse_args(argv)

    options.output_dir.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(options.notebook, as_version=4)
    print(f"Executing {options.notebook}", flush=True)
    failure = None
    try:
        # Runs are recorded in the working directory: keep them out of the tutorials' folder.
        execute(notebook, working_dir=options.output_dir)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = error
    page = write(notebook, options.notebook.stem, options.output_dir)
    if failure is not None:
        print(failure, file=sys.stderr)
        print(f"{options.notebook} failed; what it showed until then: {page}", file=sys.stderr)
        return 1
    print(f"Wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
