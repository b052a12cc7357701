"""Every Python block of the documents does what it says, on two ranks, in the order of the page.

A comment before a block says what is different about it: `<!-- not run: why -->` or
`<!-- raises: NameOfError -->`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from IPython.core.interactiveshell import InteractiveShell

import dtkit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- ([a-z ]+): (.*?) -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL
)
DOCUMENTS = [
    path
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    if "```python" in path.read_text()
]


@pytest.fixture(scope="module")
def shell(
    tmp_path_factory: pytest.TempPathFactory, owned_pids: set[int]
) -> Iterator[InteractiveShell]:
    """A shell in a folder of its own, with two ranks."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # else ipykernel captures nothing of an engine
    shell = InteractiveShell.instance(colors="nocolor")
    with contextlib.chdir(tmp_path_factory.mktemp("notebook")):
        shell.run_cell("%load_ext dtkit\n%dist_init -n 2")
        session = dtkit.current_session()
        assert session is not None
        owned_pids |= (pids := set(session.pids()))
        yield shell
        session.close()
    shell.run_cell("%unload_ext dtkit")
    InteractiveShell.clear_instance()
    owned_pids -= pids


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_does_what_it_says(document: Path, shell: InteractiveShell) -> None:
    for word, value, code in BLOCK.findall(document.read_text()):
        if word == "not run" or code.strip() == "%dist_shutdown":  # the session is everybody's
            continue
        result = shell.run_cell(code)
        if word == "raises":
            assert value in repr(result.error_in_exec), code
        else:
            assert result.success, code
    shell.run_cell("%dist_reset")
