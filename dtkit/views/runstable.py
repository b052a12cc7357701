"""Runs as a table, and tables of short texts in general: HTML and plain text."""

from __future__ import annotations

import time
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any

from dtkit._format import format_loss, format_time
from dtkit.recipe import Recipe
from dtkit.views.words import GLYPHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.values import RunFacts

__all__ = ["changed", "html_table", "runs_bundle", "text_table"]

_HEAD = ("name", "state", "started", "took", "ranks", "steps", "loss", "recipe")


def runs_bundle(title: str, facts: Sequence[RunFacts]) -> dict[str, str]:
    """Return the runs of a folder as text/html and text/plain."""
    if not facts:
        text = f"no runs in {title}: %%dist_train makes one"
        return {"text/plain": text, "text/html": f"<div>{escape(text)}</div>"}
    rows = [_row(f) for f in facts]
    return {
        "text/plain": f"{title}\n{text_table(_HEAD, rows)}",
        "text/html": f"<div>{escape(title)}</div>{html_table(_HEAD, rows)}",
    }


def changed(recipe: dict[str, Any]) -> str:
    """Return a recipe in one line: what is not as it is by default."""
    usual = {f.name: f.default for f in fields(Recipe)}
    parts = []
    for name, value in recipe.items():
        if value == usual.get(name) or not value:
            continue
        flag = f"--{name.replace('_', '-')}"
        parts.append(flag if value is True else f"{flag} {value}")
    return " ".join(parts)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are escaped."""
    style = "style='text-align:left'"
    first = "".join(f"<th {style}>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of aligned columns."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _row(facts: RunFacts) -> tuple[str, ...]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.start_unix_s))
    return (
        facts.name,
        f"{GLYPHS.get(facts.state, '○')} {facts.state}",
        started,
        format_time(facts.elapsed_s),
        str(len(facts.ranks)),
        f"{facts.num_steps:,}",
        "–" if facts.loss is None else format_loss(facts.loss),
        changed(facts.recipe),
    )
