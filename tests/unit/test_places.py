"""Where ranks are in words, and when a run counts as stalled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from run_views import make_view

from dtkit._where import absent, describe, describe_all, format_seconds
from dtkit.driver.stall import StallWatch, stall_limit_s
from dtkit.magics.tables import PlaceTable
from dtkit.values import RankPlace
from dtkit.views.words import format_metrics, text_line

if TYPE_CHECKING:
    from collections.abc import Iterable


def inside(rank: int, sequence: int | None = 17, seconds: float = 34.0, **more: str) -> RankPlace:
    return RankPlace(
        rank, "collective", 14, operation="all_reduce", sequence=sequence, seconds=seconds, **more
    )


def test_each_rank_in_words() -> None:
    assert describe(inside(0)) == "in all_reduce #17"
    assert describe(inside(0, None, group="group pair")) == "in all_reduce of group pair"
    assert describe(RankPlace(1, "python", 7)) == "in Python"
    assert describe(RankPlace(1, "data", 7)) == "waiting for data"
    assert describe(RankPlace(1, "no answer")) == "no answer"
    assert [format_seconds(s) for s in (0.24, 34.4, 200.0)] == ["0.2 s", "34 s", "3 min 20 s"]


def test_who_has_not_arrived_is_named_with_where_it_is() -> None:
    places = [inside(0), inside(1), RankPlace(2, "python", 7, seconds=36.0), inside(3)]
    assert describe_all(places) == (
        "rank 2 has not arrived: ranks 0, 1, 3 wait in all_reduce #17, cell line 14, for 34 s; "
        "rank 2 is in Python (cell line 7, 36 s)"
    )


@pytest.mark.parametrize(
    ("places", "missing"),
    [
        ([inside(0), inside(1)], []),  # all are there: the network is at work
        ([inside(0), inside(1, 16)], [1]),  # one is a collective behind
        ([RankPlace(0, "python", 3), RankPlace(1, "data", 3)], []),
        ([inside(0, seconds=0.1), inside(1, 16, seconds=0.1)], []),  # they answered one by one
        ([inside(0), RankPlace(1, "no answer")], [1]),
        ([inside(0), RankPlace(1, "lost")], [1]),
        ([inside(0), inside(1, 40, group="pair")], [1]),  # numbers of other groups do not compare
        ([], []),
    ],
)
def test_who_is_waited_for(places: list[RankPlace], missing: list[int]) -> None:
    assert [place.rank for place in absent(places)] == missing
    assert bool(describe_all(places)) == bool(missing)


def test_the_table_shows_a_line_each() -> None:
    text = repr(PlaceTable((inside(0), RankPlace(1, "data", 3, "train.py", seconds=2.0))))
    assert "0     in all_reduce #17  14          34 s" in text
    assert "1     waiting for data   train.py 3  2.0 s" in text
    assert text.startswith("rank 1 has not arrived")
    assert repr(PlaceTable((RankPlace(0, "idle"),))).startswith("rank  now")


def test_the_host_is_named_where_there_are_several() -> None:
    places = (inside(0, host="alpha"), RankPlace(1, "data", 3, host="beta", seconds=2.0))
    text = repr(PlaceTable(places))
    assert text.startswith("rank 1 has not arrived")
    assert "; rank 1 on beta is waiting for data" in text
    assert "0     alpha  in all_reduce #17" in text
    assert "1     beta   waiting for data" in text


def test_a_stall_is_ten_steps_and_at_least_half_a_minute() -> None:
    assert stall_limit_s(100.0) == 30.0
    assert stall_limit_s(6000.0) == 60.0
    assert stall_limit_s(math.nan) == math.inf


class Rank1IsLate:
    """Engines whose rank 0 waits for rank 1."""

    ranks = (0, 1)
    lost = ()
    host_of = dict.fromkeys(range(4), "")
    num_asked = 0

    def control(self, _operation: str, *, timeout_s: float) -> dict[int, dict[str, object]]:
        assert timeout_s < 1.0  # Stop must not wait for long
        self.num_asked += 1
        return {
            0: {
                "state": "collective",
                "line": 9,
                "operation": "all_reduce",
                "sequence": 3,
                "seconds": 39.0,
            },
            1: {"state": "python", "line": 5, "seconds": 40.0},
        }


class FakeRun:
    """A run that made its last step `idle_s` ago."""

    ranks = (0, 1)

    def __init__(self, idle_s: float, step_ms: float) -> None:
        self.now = (idle_s, step_ms)
        self.said: list[str] = []

    def pace(self) -> tuple[float, float]:
        return self.now

    def set_stall(self, text: str) -> None:
        self.said.append(text)


def look(pairs: Iterable[tuple[float, float]]) -> list[str]:
    said = []
    for idle_s, step_ms in pairs:
        run = FakeRun(idle_s, step_ms)
        StallWatch(Rank1IsLate(), run).look()  # type: ignore[arg-type]
        said += run.said
    return said


def test_a_stall_is_said_and_names_who_has_not_arrived() -> None:
    assert look([(29.0, 100.0), (45.0, 5000.0), (math.nan, math.nan), (99.0, math.nan)]) == [""] * 4
    (text,) = look([(45.0, 100.0)])
    assert text.startswith(
        "no step for 45 s: rank 1 has not arrived: rank 0 waits in all_reduce #3"
    )
    assert "rank 1 is in Python (cell line 5, 40 s)" in text


def test_who_waits_for_a_rank_that_has_ended_the_cell_is_named_after_some_seconds() -> None:
    class Rank1HasEnded(Rank1IsLate):
        def control(self, operation: str, *, timeout_s: float) -> dict[int, dict[str, object]]:
            return {**super().control(operation, timeout_s=timeout_s), 1: {"state": "idle"}}

    text = (
        "no step for 6.0 s: the cell has ended on rank 1, and rank 0 waits in vain in "
        "all_reduce #3 (cell line 9): it makes more steps there. ■ frees all"
    )
    for idle_s, expected in ((4.0, ""), (6.0, text)):
        run = FakeRun(idle_s, 100.0)
        StallWatch(Rank1HasEnded(), run).look()  # type: ignore[arg-type]
        assert run.said == [expected]
    assert look([(6.0, 100.0)]) == [""]


def test_the_ranks_are_not_asked_all_the_time() -> None:
    engines = Rank1IsLate()
    watch = StallWatch(engines, FakeRun(45.0, 100.0))  # type: ignore[arg-type]
    for _ in range(3):
        watch.look()
    assert engines.num_asked == 1


def test_the_dashboard_marks_a_stall() -> None:
    view = make_view(stall="no step for 45 s")
    assert format_metrics(view) == "▲ stalled: no step for 45 s"
    assert "▲ stalled: no step for 45 s" in text_line(view)
