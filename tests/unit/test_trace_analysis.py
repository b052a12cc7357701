"""A straggler, a data stall and a slow link that were planted are named, with their size."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from traces import Plan, make_traces

from dtkit.trace.advice import advise
from dtkit.trace.analysis import analyse
from dtkit.trace.intervals import clip, intersect, subtract, total, union


def test_nothing_wrong_nothing_said() -> None:
    found = analyse(make_traces([Plan()] * 4, transfer=2))
    assert found is not None
    assert advise(found) == ()
    assert found.num_steps == 8  # without the first two
    assert found.step_ms == 35
    rank = found.ranks[0]
    assert (rank.data_ms, rank.compute_ms, rank.exposed_ms, rank.idle_ms) == (1, 32, 2, 0)
    assert rank.overlapped_ms == 1
    assert rank.waited_ms == 0
    assert found.stragglers == ()


@pytest.mark.parametrize(
    ("plan", "cause", "planted_ms"),
    [
        (Plan(data=16), "data", 15),
        (Plan(forward=25), "compute", 15),
        (Plan(backward=35), "compute", 15),
        (Plan(idle=15), "idle", 15),
    ],
)
def test_a_straggler_is_named_with_its_cause(plan: Plan, cause: str, planted_ms: int) -> None:
    plans = [Plan(), Plan(), plan, Plan()]
    found = analyse(make_traces(plans, num_steps=20, transfer=2))
    assert found is not None
    late = found.stragglers[0]
    assert (late.rank, late.cause) == (2, cause)
    assert late.waited_ms == pytest.approx(planted_ms, rel=0.1)
    assert late.excess_ms == pytest.approx(planted_ms, rel=0.1)
    assert late.share == pytest.approx(planted_ms / found.step_ms, rel=0.1)
    assert late.last_share == pytest.approx(1.0, rel=0.1)
    (sentence,) = advise(found)
    assert "for rank 2" in sentence
    assert f"{late.share:.0%}" in sentence
    for times in found.ranks:
        parts = times.data_ms + times.compute_ms + times.exposed_ms + times.idle_ms
        assert parts == pytest.approx(times.step_ms)


def test_ranks_that_take_turns_in_being_late_are_not_blamed() -> None:
    even, odd = make_traces([Plan(), Plan(forward=40)]), make_traces([Plan(forward=40), Plan()])
    for mine, other in zip(even, odd, strict=True):
        mine.steps[1::2] = other.steps[1::2]  # they take equally long
    found = analyse(even)
    assert found is not None
    assert [late.cause for late in found.stragglers] == ["", ""]
    (sentence,) = advise(found)
    assert "wait for each other" in sentence
    assert f"{found.share('waited'):.0%}" in sentence


def test_a_data_stall_of_all_ranks_is_no_ones_fault() -> None:
    found = analyse(make_traces([Plan(data=20)] * 4, transfer=2))
    assert found is not None
    assert found.stragglers == ()
    assert found.share("data") == pytest.approx(20 / 54)
    (sentence,) = advise(found)
    assert "37% of the step for its own DataLoader" in sentence


def test_a_slow_link_is_named_with_its_speed() -> None:
    found = analyse(make_traces([Plan()] * 4, transfer=30, num_bytes=3 << 20))
    assert found is not None
    assert found.share("transfer") == pytest.approx(30 / 63)
    assert found.sent_bytes == 6 << 20
    assert found.bandwidth == pytest.approx((6 << 20) / 0.031)
    (sentence,) = advise(found)
    assert "48% of the step" in sentence
    assert "6.0 MiB at 194 MiB/s" in sentence


def test_what_costs_most_comes_first() -> None:
    plans = [Plan(idle=20), Plan(idle=20, data=50)]
    found = analyse(make_traces(plans, transfer=15))
    assert found is not None
    sentences = advise(found)
    assert ["rank 1" in s for s in sentences] == [True, False, False]
    assert "between steps" in sentences[1]
    assert "MiB" in sentences[2]


def test_ranks_that_were_cut_short_are_compared_where_both_are() -> None:
    traces = make_traces([Plan()] * 2, num_steps=10)
    del traces[1].steps[6:]
    found = analyse(traces)
    assert found is not None
    assert found.num_steps == 4
    traces[1].steps.clear()
    assert analyse(traces) is None
    assert analyse([]) is None


def test_one_rank_waits_for_nobody() -> None:
    found = analyse(make_traces([Plan()], transfer=0))
    assert found is not None
    assert found.stragglers == ()
    assert advise(found) == ()


def test_intervals_are_sets() -> None:
    """Against the same operations on sets of whole numbers."""
    draw = random.Random(0)

    def some() -> list[tuple[int, int]]:
        starts = [draw.randrange(40) for _ in range(draw.randrange(6))]
        return [(start, start + draw.randrange(8)) for start in starts]

    def points(parts: list[tuple[int, int]]) -> set[int]:
        return {x for start, end in parts for x in range(start, end)}

    for _ in range(500):
        a, b = union(some()), union(some())
        assert points(intersect(a, b)) == points(a) & points(b)
        assert points(subtract(a, b)) == points(a) - points(b)
        assert points(clip(a, 10, 20)) == points(a) & set(range(10, 20))
        assert total(a) == len(points(a))
        assert all(x[1] < y[0] for x, y in pairwise(a))
