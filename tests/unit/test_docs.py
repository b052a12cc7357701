"""What the documents point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the relative links of a Markdown text that lead nowhere."""
    links = _LINK.findall(_CODE_BLOCK.sub("", text))
    paths = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    return [path for path in paths if path and not (folder / path).exists()]


def make_commands(text: str) -> set[str]:
    """Return the targets of the `make` commands that stand in code."""
    code = [*_CODE_BLOCK.findall(text), *re.findall(r"`[^`\n]+`", _CODE_BLOCK.sub("", text))]
    return {target for part in code for target in _MAKE.findall(part)}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document.read_text(), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_commands_exist(document: Path) -> None:
    assert make_commands(document.read_text()) - make_targets() == set()


def test_the_readme_opens_with_demo_and_test() -> None:
    first_block = _CODE_BLOCK.search((ROOT / "README.md").read_text())
    assert first_block is not None
    assert [line.split("#")[0].strip() for line in first_block[0].splitlines()[1:-1]] == [
        "make demo",
        "make test",
    ]


def test_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "here.md").touch()
    text = "[a](here.md#part) [b](gone.md) [c](https://example.org) `make gone`\n```\nmake x\n```\n"
    assert broken_links(text, tmp_path) == ["gone.md"]
    assert make_commands(text) == {"gone", "x"}
