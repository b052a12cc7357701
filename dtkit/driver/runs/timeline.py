"""A run's timeline in the notebook: a picture, where the time goes, who was waited for, advice."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from dtkit._format import format_rate
from dtkit.driver.runs import archive
from dtkit.errors import InvalidInputError
from dtkit.trace.advice import advise
from dtkit.trace.analysis import Analysis, RankTimes, analyse
from dtkit.trace.profiles import Operators, read_operators
from dtkit.trace.rows import names_of, read_run
from dtkit.views.comparison import mean_rate
from dtkit.views.runstable import html_table, text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.driver.runs.run import Run

__all__ = ["OperatorTable", "Timeline", "Timelines", "operators_of", "timeline_of"]

_MAX_STEPS = 1000
"""The last ones of a longer run are analysed: it takes a second, and they are what it is like."""
_MAX_OPERATORS = 20
_HEAD = ("rank", "step", "compute", "exposed comm.", "data wait", "idle", "overlapped comm.")
_LATE = ("waited for", "by the others", "of the step", "last to join", "because of", "longer by")
_WORDS = {"data": "its DataLoader", "compute": "computing", "idle": "time between phases"}


class Timeline:
    """What a run's timeline says; a notebook shows it as a picture and tables.

    Attributes:
        run: the run.
        analysis: the numbers.
        advice: up to three sentences, none when nothing is wrong.
        efficiency: samples/s over those of so many single ranks, None where no run
            of the same cell on one rank is known.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._traces = read_run(run.dir, _MAX_STEPS)
        found = analyse(self._traces)
        if found is None:
            msg = (
                f"run {run.name!r} has no timeline: record one with %%dist_train --timeline"
                if not self._traces
                else f"run {run.name!r} has no step that all ranks have made"
            )
            raise InvalidInputError(msg)
        self.analysis: Analysis = found
        self.names: dict[int, str] = names_of(self._traces)
        """What each rank is called in tables: with its host, if there are several."""
        self.advice: tuple[str, ...] = advise(found, self.names)
        self._single = _single_rank_run(run)
        self.efficiency: float | None = _efficiency(run, self._single)

    def facts(self) -> dict[str, str]:
        """Return the numbers of the run as a whole, in words."""
        found = self.analysis
        facts = {"steps": str(found.num_steps), "step": f"{found.step_ms:.1f} ms"}
        for label, name in _SHARES.items():
            facts[label] = f"{found.share(name):.0%}"
        late = next(iter(found.stragglers), None)
        facts["waited most for"] = (
            "nobody" if late is None else f"{self.names[late.rank]}, {late.share:.0%} of the step"
        )
        if error_ns := max(trace.error_ns for trace in self._traces):
            facts["hosts' clocks"] = f"compared within {error_ns / 1e6:.2f} ms"
        facts["samples/s"] = format_rate(mean_rate(self.run.history))
        if self.efficiency is not None and self._single is not None:
            facts["scaling efficiency"] = (
                f"{self.efficiency:.0%} of {len(self.run.ranks)} × run {self._single.name!r}"
            )
        return facts

    def png(self) -> bytes:
        """Return the picture of the last steps."""
        from dtkit.views.gantt import draw  # loads matplotlib

        return draw(self._traces, f"{self.run.name}: the last steps")

    def zoomable(self) -> Any:  # Any: anywidget is there or not
        """Return a widget of all steps, to be zoomed and moved in the browser.

        Raises:
            InvalidInputError: anywidget is not installed.
        """
        from dtkit.views.zoom import zoomable  # loads anywidget

        return zoomable(self._traces)

    def alt(self) -> str:
        """Return the picture in words."""
        from dtkit.views.gantt import alt_text

        return alt_text(self._traces)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return Timelines([self])._repr_mimebundle_(**kwargs)

    def __repr__(self) -> str:
        facts = "\n".join(f"{name}: {value}" for name, value in self.facts().items())
        parts = [facts, text_table(_HEAD, _rank_rows(self))]
        if self.analysis.stragglers:
            parts.append(text_table(_LATE, _late_rows(self)))
        return "\n\n".join([*parts, *self.advice])


class Timelines:
    """One timeline, or several side by side."""

    def __init__(self, timelines: Sequence[Timeline]) -> None:
        self.timelines: tuple[Timeline, ...] = tuple(timelines)

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        return {
            "text/plain": repr(self),
            "text/html": "".join(map(_picture, self.timelines)) + self._tables(),
            "image/png": base64.b64encode(self.timelines[0].png()).decode(),
        }

    def _tables(self) -> str:
        html = ""
        if len(self.timelines) > 1:
            html += html_table(("", *(t.run.name for t in self.timelines)), self._rows())
        for timeline in self.timelines:
            name = f"<b>{escape(timeline.run.name)}</b>" if len(self.timelines) > 1 else ""
            html += name + _details(timeline, with_facts=len(self.timelines) == 1)
        return html

    def _rows(self) -> list[tuple[str, ...]]:
        all_facts = [t.facts() for t in self.timelines]
        names = dict.fromkeys(name for facts in all_facts for name in facts)
        return [(name, *(facts.get(name, "–") for facts in all_facts)) for name in names]

    def __repr__(self) -> str:
        if len(self.timelines) == 1:
            return repr(self.timelines[0])
        head = ("", *(t.run.name for t in self.timelines))
        advice = [f"{t.run.name}: {text}" for t in self.timelines for text in t.advice]
        return "\n\n".join([text_table(head, self._rows()), *advice])


_SHARES = {
    "compute": "compute",
    "exposed communication": "exposed",
    "overlapped communication": "overlapped",
    "data wait": "data",
    "idle": "idle",
}


def timeline_of(*runs: Run) -> Timeline | Timelines:
    """Return the timeline of a run, or those of several side by side.

    Raises:
        InvalidInputError: a run has none.
    """
    found = [Timeline(run) for run in runs]
    return found[0] if len(found) == 1 else Timelines(found)


class OperatorTable:
    """What each operator took on each rank, milliseconds per step, the longest first."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        ranks = self.operators.ranks
        head = ("operator", *(f"rank {rank}, ms per step" for rank in ranks))
        shown = list(self.operators.rows.items())[:_MAX_OPERATORS]
        return head, [
            (name, *(f"{times.get(rank, 0.0):.3f}" for rank in ranks)) for name, times in shown
        ]


def operators_of(run: Run) -> OperatorTable:
    """Return the operators of a run that was profiled.

    Raises:
        InvalidInputError: it was not.
    """
    found = read_operators(run.dir)
    if found is None:
        msg = f"run {run.name!r} was not profiled: use %%dist_train --profile"
        raise InvalidInputError(msg)
    return OperatorTable(found)


def _picture(timeline: Timeline) -> str:
    source = base64.b64encode(timeline.png()).decode()
    alt = escape(timeline.alt(), quote=True)
    return (
        f'<img src="data:image/png;base64,{source}" alt="{alt}" width="740" '
        'style="max-width:100%;display:block">'
    )


def _details(timeline: Timeline, *, with_facts: bool) -> str:
    html = "".join(f"<p>▲ {escape(text)}</p>" for text in timeline.advice)
    if with_facts:
        line = " · ".join(f"{name} {value}" for name, value in timeline.facts().items())
        html += f"<div>{escape(line)}</div>"
    html += html_table(_HEAD, _rank_rows(timeline))
    if timeline.analysis.stragglers:
        html += html_table(_LATE, _late_rows(timeline))
    return html


def _rank_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    names = ("compute", "exposed", "data", "idle", "overlapped")
    return [
        (
            timeline.names[r.rank].removeprefix("rank "),
            f"{r.step_ms:.1f} ms",
            *(_percent(r, name) for name in names),
        )
        for r in timeline.analysis.ranks
    ]


def _percent(times: RankTimes, name: str) -> str:
    return f"{getattr(times, f'{name}_ms') / times.step_ms:.0%}" if times.step_ms else "–"


def _late_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    return [
        (
            timeline.names[late.rank],
            f"{late.waited_ms:.1f} ms per step",
            f"{late.share:.0%}",
            f"{late.last_share:.0%} of collectives",
            _WORDS.get(late.cause, "chance"),
            f"{late.excess_ms:.1f} ms" if late.cause else "–",
        )
        for late in timeline.analysis.stragglers
    ]


def _single_rank_run(run: Run) -> Run | None:
    """Return the newest run of the same cell that went well on one rank."""
    if len(run.ranks) == 1:
        return None
    runs = archive.runs(run.dir.parent)
    for facts in runs.facts():
        if len(facts.ranks) == 1 and facts.state == "finished":
            found = runs[facts.name]
            if _body(found.cell) == _body(run.cell):
                return found
    return None


def _body(cell: str) -> str:
    """Return a cell without the magic's line, which names ranks and other options."""
    first, _, rest = cell.partition("\n")
    return (rest if first.startswith("# %") else cell).strip()


def _efficiency(run: Run, single: Run | None) -> float | None:
    if single is None:
        return None
    one = mean_rate(single.history)
    return mean_rate(run.history) / (len(run.ranks) * one) if one > 0 else None
