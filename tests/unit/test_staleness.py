"""The histogram of staleness, in HTML and in words."""

import dataclasses
import re

from dtkit.telemetry import RunState
from dtkit.views.staleness import staleness_bars, staleness_text
from dtkit.views.words import summary_text


def test_a_run_in_step_has_none() -> None:
    view = RunState("run", [0, 1]).view()
    assert staleness_bars(view) == staleness_text(view) == ""


def test_each_value_has_a_bar_with_its_share() -> None:
    view = dataclasses.replace(RunState("run", [0]).view(), staleness=((0, 1), (3, 3)))
    bars = staleness_bars(view)
    assert re.findall(r"(\d+) %<div[^>]*height:(\d+)px[^>]*></div>(\d)", bars) == [
        ("25", "13", "0"), ("0", "1", "1"), ("0", "1", "2"), ("75", "40", "3"),
    ]  # fmt: skip
    assert "staleness 2.2 on average, 3 at most" in summary_text(view, [])


def test_many_values_share_bars() -> None:
    view = dataclasses.replace(
        RunState("run", [0]).view(), staleness=tuple((n, 1) for n in range(50))
    )
    labels = re.findall(r"</div>(\d+–\d+)</td>", staleness_bars(view))
    assert labels[:2] == ["0–4", "5–9"]
    assert len(labels) == 10
