"""Execute a notebook and write it, with its outputs, as .ipynb and .html.

make demo runs: python tools/build_notebook.py notebooks/01_first_run.ipynb --output-dir build
make docs adds --site: the page links to the documentation's others.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from jinja2 import DictLoader
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbformat import NotebookNode

CELL_TIMEOUT_S = 600

_PAGE = """\
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
{%- block body_header -%}
{{ super() }}
{%- if resources.is_on_site %}
<nav style="padding: 8px 16px"><a href="../index.html">dtkit</a> /
<a href="../tutorials.html">tutorials</a></nav>
{%- endif %}
{%- endblock body_header -%}
"""
"""nbconvert's page without what it loads from the net for formulas and diagrams."""


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


def write(notebook: NotebookNode, name: str, output_dir: Path, *, is_on_site: bool) -> Path:
    """Write `name`.ipynb and `name`.html and return the path of the latter.

    Args:
        notebook: with its outputs; its links are turned if the page is on the site.
        name: of both files.
        output_dir: where.
        is_on_site: whether the documentation's other pages are beside the folder.
    """
    nbformat.write(notebook, output_dir / f"{name}.ipynb")
    if is_on_site:
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _on_site(cell.source)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page": _PAGE})], template_file="page")
    resources = {"metadata": {"name": name}, "is_on_site": is_on_site}
    html, _ = exporter.from_notebook_node(notebook, resources)
    page = output_dir / f"{name}.html"
    page.write_text(html, encoding="utf-8")
    return page


def _on_site(text: str) -> str:
    """Return Markdown whose links lead to pages of the site instead of files of the repository."""
    text = re.sub(r"\]\(\.\./docs/(\w+)\.md", r"](../\1.html", text)
    return re.sub(r"\]\((\w+)\.ipynb", r"](\1.html", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the notebook that the command line names; 0 when every cell succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("build"))
    parser.add_argument("--run-in", type=Path, help="folder for what it writes (default: output)")
    parser.add_argument("--site", action="store_true", help="a page of the documentation's site")
    parser.add_argument("--as-it-is", action="store_true", help="do not execute it")
    options = parser.parse_args(argv)

    for folder in filter(None, (options.output_dir, options.run_in)):
        folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(options.notebook, as_version=4)
    failure = None
    if not options.as_it_is:
        print(f"Executing {options.notebook}", flush=True)
        try:
            # Runs are recorded in the working directory: keep them out of the tutorials' folder.
            execute(notebook, working_dir=options.run_in or options.output_dir)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failure = error
    page = write(notebook, options.notebook.stem, options.output_dir, is_on_site=options.site)
    if failure is not None:
        print(failure, file=sys.stderr)
        print(f"{options.notebook} failed; what it showed until then: {page}", file=sys.stderr)
        return 1
    print(f"Wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
