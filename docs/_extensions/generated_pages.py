"""Pages that are made from the code and from the root's own documents, each time anew.

One page per magic from the parser that reads its line, and the documents of the repository's root
with their links turned to where they lead on the site.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.magics.registry import PARSERS, TWINS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from sphinx.application import Sphinx

    from dtkit.magics.arguments import Parser

ROOT_DOCUMENTS = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, which calls this."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir)))
    app.connect("source-read", _mend_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(docs: Path) -> None:
    """Write `magics/` and `project/`; what has not changed is left as it is."""
    pages = {
        docs / "magics" / f"{name}.md": page_of(name, parser) for name, parser in PARSERS.items()
    }
    for name in ROOT_DOCUMENTS:
        pages[docs / "project" / name.lower()] = (docs.parent / name).read_text()
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def page_of(name: str, parser: Parser) -> str:
    """Return a magic's page, as Markdown."""
    usage = textwrap.dedent(parser.format_usage().replace("usage: ", "       ", 1)).replace(
        "[-h] ", ""
    )
    twin = TWINS[name]
    parts = [
        f"# {parser.prog}",
        _escaped(parser.description or ""),
        f"```text\n{usage.rstrip()}\n```",
        *_tables(parser),
        f"From Python: {{py:obj}}`{twin}`",
    ]
    return "\n\n".join(parts) + "\n"


def _tables(parser: Parser) -> Iterator[str]:
    for group in parser._action_groups:  # noqa: SLF001  argparse has no public way
        actions = [action for action in group._group_actions if action.dest != "help"]  # noqa: SLF001
        if actions:
            rows = [f"| {_named(action)} | {_told(action)} |" for action in actions]
            title = (
                []
                if group.title in ("options", "positional arguments")
                else [f"## {group.title}", ""]
            )
            yield "\n".join([*title, "| | |", "|---|---|", *rows])


def _named(action: argparse.Action) -> str:
    value = action.metavar or (
        f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
    )
    if not action.option_strings:
        return f"`{value or action.dest}`"
    wanted = "" if action.nargs == 0 else f" [{value}]" if action.nargs == "?" else f" {value}"
    return ", ".join(f"`{option}{wanted}`" for option in action.option_strings).replace("|", "\\|")


def _told(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default, "prog": ""}
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([<>*_$])", r"\\\1", text.replace("%%", "%"))


def _mend_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links between files of the repository into links between pages of the site."""
    folder = (Path(app.srcdir) / page).parent
    origin = Path(app.srcdir).parent if page.startswith("project/") else folder
    source[0] = _LINK.sub(lambda link: _mended(link, Path(app.srcdir), folder, origin), source[0])


def _mended(link: re.Match[str], docs: Path, folder: Path, origin: Path) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    if re.match(r"[a-z]+:", target):
        return link[0]
    path = (origin / target).resolve()
    up = "../" * len(folder.relative_to(docs).parts)
    if path.parent == docs.parent and path.name in ROOT_DOCUMENTS:
        return f"[{text}]({up}project/{path.name.lower()}{anchor})"
    if path.suffix == ".ipynb":
        return f'<a href="{up}tutorials/{path.stem}.html">{text}</a>'
    if docs in path.parents:
        return f"[{text}]({up}{path.relative_to(docs)}{anchor})"
    return text if text.startswith("`") else f"`{text}`"
