"""RunState: events of all ranks in, views and history out."""

import math

import numpy as np
import pytest

from dtkit.events import LogBatch, Note, RankEnded, RankStarted, StepBatch, Total
from dtkit.telemetry import RunState
from dtkit.telemetry.view import MAX_POINTS


def steps(rank: int, first: int, last: int, **columns: float | list[float]) -> StepBatch:
    numbers = list(range(first, last + 1))
    given = {
        "step": [float(n) for n in numbers],
        "time_s": [0.01 * n for n in numbers],
        "loss": 1.0, "samples": 32.0, "step_ms": 10.0, "data_ms": 1.0, "comm_ms": 2.0, "lr": 0.1,
        **columns,
    }  # fmt: skip
    filled = {k: v if isinstance(v, list) else [v] * len(numbers) for k, v in given.items()}
    return StepBatch(rank, filled, peak_bytes=2**30)


def started(num_ranks: int) -> RunState:
    state = RunState("run", range(num_ranks), start_unix_s=0.0)
    for rank in range(num_ranks):
        state.handle(RankStarted(rank, 100 + rank, "host", "cpu", 0.0))
    return state


def test_a_step_counts_once_every_rank_has_made_it() -> None:
    state = started(2)
    state.handle(steps(0, 1, 5))
    assert state.view().step == 0
    state.handle(steps(1, 1, 3))
    assert state.view().step == 3
    assert state.history().num_steps == 3


def test_the_loss_is_weighted_by_samples() -> None:
    state = started(2)
    state.handle(steps(0, 1, 1, loss=1.0, samples=30.0))
    state.handle(steps(1, 1, 1, loss=4.0, samples=10.0))
    history = state.history()
    assert history["loss"][0] == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert history["samples_per_s"][0] == pytest.approx(40 / 0.010)


def test_at_its_end_a_run_shows_the_rate_of_all_of_it_but_the_first_step() -> None:
    state = started(1)
    state.handle(steps(0, 1, 14, samples=128.0))
    state.handle(steps(0, 15, 15, samples=5.0))
    whole = (13 * 128 + 5) / 0.140
    state.end("finished")
    assert state.view().samples_per_s == pytest.approx(whole)


def test_a_first_step_that_loads_the_compiler_slows_no_rate_down() -> None:
    state = started(1)
    state.handle(steps(0, 1, 1, time_s=[4.0], step_ms=4000.0))
    assert state.view().samples_per_s == pytest.approx(8)  # there is no other
    state.handle(steps(0, 2, 11, time_s=[4.0 + 0.01 * n for n in range(1, 11)]))
    for _ in range(2):
        view = state.view()
        assert view.samples_per_s == pytest.approx(3200)
        assert view.ranks[0].samples_per_s == pytest.approx(3200)
        assert view.rate_curve.step[0] == 2
        assert view.rate_curve.lines["all ranks"] == pytest.approx([3200] * 10)
        state.end("finished")


def test_an_epochs_small_last_batch_is_no_slump_of_the_rate() -> None:
    state = started(2)
    for first in range(1, 150, 15):
        for rank in range(2):
            state.handle(steps(rank, first, first + 13, samples=64.0))
            state.handle(steps(rank, first + 14, first + 14, samples=2.0))
    rate, low, high = state.view().rate_curve.lines.values()
    usual = rate[20:]
    assert usual.min() > 0.8 * usual.max()
    assert (low <= rate).all()
    assert (rate <= high).all()


def test_a_rank_without_samples_does_not_count() -> None:
    state = started(2)
    state.handle(steps(0, 1, 1, loss=1.0, samples=1.0))
    state.handle(steps(1, 1, 1, loss=9.0, samples=0.0))
    assert state.history()["loss"][0] == 1.0


def test_without_known_samples_ranks_count_alike() -> None:
    state = started(2)
    state.handle(steps(0, 1, 1, loss=1.0, samples=0.0))
    state.handle(steps(1, 1, 1, loss=3.0, samples=0.0))
    assert state.history()["loss"][0] == 2.0
    assert math.isnan(state.history()["samples_per_s"][0])


def test_a_loss_that_is_nan_stays_nan() -> None:
    state = started(2)
    for rank in range(2):
        state.handle(steps(rank, 1, 2, loss=[1.0, math.nan]))
    loss = state.history()["loss"]
    assert loss[0] == 1.0
    assert math.isnan(loss[1])
    assert state.view().loss == 1.0


def test_a_rank_that_ended_holds_nobody_up() -> None:
    state = started(2)
    state.handle(steps(0, 1, 5))
    state.handle(steps(1, 1, 2))
    state.handle(RankEnded(1, "finished", 2, 1.0))
    assert state.view().step == 5
    assert state.view().ranks[1].state == "finished"


def test_a_rank_far_behind_does_not_stop_the_record() -> None:
    state = started(2)
    state.handle(steps(1, 1, 1))
    for first in range(1, 20_001, 1000):
        state.handle(steps(0, first, first + 999))
    assert state.view().step > 11_000


def test_steps_at_which_nobody_looks_are_all_there() -> None:
    state = started(2)
    for first in range(1, 30_001, 1000):
        for rank in range(2):
            losses = [1 / n for n in range(first, first + 1000)]
            state.handle(steps(rank, first, first + 999, loss=losses))
    np.testing.assert_allclose(state.history()["loss"], 1 / np.arange(1, 30_001))


def test_rates_of_a_long_run_are_those_of_its_steps() -> None:
    state = started(2)
    for first in range(1, 3001, 50):
        for rank in range(2):
            batch = steps(rank, first, first + 49, step_ms=10.0 + 10.0 * (first > 1500))
            state.handle(batch)
        state.view()
    curve = state.view().rate_curve
    early, rate = curve.step <= 1500, curve.lines["all ranks"]
    np.testing.assert_allclose(rate[early], 6400.0)
    np.testing.assert_allclose(rate[~early][3:], 3200.0)
    np.testing.assert_allclose(curve.lines["slowest"], rate)


def test_of_many_ranks_the_median_is_drawn() -> None:
    state = started(10)
    for rank in range(10):
        state.handle(steps(rank, 1, 4 if rank < 9 else 2, step_ms=float(rank)))
    lines = state.curves()["ms of a step by rank"].lines
    assert lines["slowest"].tolist() == [9.0, 9.0, 8.0, 8.0]
    assert lines["median"].tolist() == [4.5, 4.5, 4.0, 4.0]


def test_the_history_is_as_long_as_the_run_and_the_view_is_not() -> None:
    state = started(1)
    for first in range(1, 5001, 100):
        state.handle(steps(0, first, first + 99, loss=[1 / n for n in range(first, first + 100)]))
    view, history = state.view(), state.history()
    assert history.num_steps == 5000
    np.testing.assert_allclose(history["loss"], 1 / np.arange(1, 5001))
    assert len(view.loss_curve.step) <= MAX_POINTS
    assert view.loss_curve.step[-1] == 5000


def test_times_and_shares_come_from_the_steps() -> None:
    state = started(2)
    for rank in range(2):
        state.handle(steps(rank, 1, 100))
    view = state.view()
    assert view.step_ms == 10.0
    assert view.data_share == pytest.approx(0.1)
    assert view.comm_share == pytest.approx(0.2)
    assert view.peak_gib == 1.0
    rank = view.ranks[0]
    assert (rank.compute_ms, rank.samples_per_s) == (7.0, pytest.approx(3200.0))


def test_logged_metrics_are_columns_averaged_over_ranks() -> None:
    state = started(2)
    for rank in range(2):
        state.handle(steps(rank, 1, 3))
        state.handle(LogBatch(rank, [2], [0.02], [{"accuracy": 0.5 + rank, "loss": 9.0}]))
    history = state.history()
    np.testing.assert_array_equal(history["accuracy"], [math.nan, 1.0, math.nan])
    np.testing.assert_array_equal(history["logged_loss"], [math.nan, 9.0, math.nan])
    assert state.view().metrics["accuracy"] == 1.0


def test_metrics_without_any_step_make_rows_too() -> None:
    state = started(1)
    state.handle(LogBatch(0, [0], [0.5], [{"score": 3.0}]))
    history = state.history()
    assert list(history["step"]) == [0.0]
    assert list(history["score"]) == [3.0]


def test_an_unknown_column_names_those_that_there_are() -> None:
    with pytest.raises(KeyError, match="loss"):
        started(1).history()["losss"]


def test_progress_is_estimated_from_the_loops() -> None:
    state = started(1)
    state.handle(Total(0, 100))
    state.handle(steps(0, 1, 50))
    view = state.view()
    assert view.total_steps == 100
    assert view.eta_s == pytest.approx(0.5)


def test_notes_are_kept_once_and_the_end_is_final() -> None:
    state = started(2)
    for rank in range(2):
        state.handle(Note(rank, "left alone"))
    state.end("failed", "ValueError: boom")
    view = state.view()
    assert view.notes == ("left alone",)
    assert (view.state, view.error) == ("failed", "ValueError: boom")
    assert {rank.state for rank in view.ranks} == {"failed"}
    assert view.elapsed_s == state.view().elapsed_s


def free(num_ranks: int) -> RunState:
    state = RunState("run", range(num_ranks), start_unix_s=0.0, is_free=True)
    for rank in range(num_ranks):
        state.handle(RankStarted(rank, 100 + rank, "host", "cpu", 0.0))
    return state


def test_steps_that_ranks_make_without_each_other_are_rows_in_time() -> None:
    state = free(2)
    state.handle(steps(0, 1, 4, time_s=[0.1, 0.2, 0.3, 0.4], step_ms=100.0, loss=1.0))
    state.handle(steps(1, 1, 1, time_s=[0.35], step_ms=350.0, comm_ms=35.0, loss=5.0))
    state.handle(Total(0, 40))
    state.end("finished")
    history = state.history()
    assert history["time_s"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.35, 0.4])
    assert history["loss"].tolist() == [1.0, 1.0, 1.0, 5.0, 1.0]
    assert history["step_ms"].tolist() == pytest.approx([100, 100, 100, 50, 50])
    assert history["comm_ms"][3] == pytest.approx(5)  # a tenth, as of the rank's own step
    view = state.view()
    assert view.samples_per_s == pytest.approx(4 * 32 / 0.3)
    assert view.total_steps == 80
    assert [rank.step for rank in view.ranks] == [4, 1]


def test_a_row_is_there_once_no_earlier_step_can_come() -> None:
    state = free(2)
    state.handle(steps(0, 1, 3, time_s=[0.1, 0.2, 0.3]))
    assert state.view().step == 0
    state.handle(steps(1, 1, 1, time_s=[0.25]))
    assert state.view().step == 3
    state.handle(steps(0, 4, 4, time_s=[9.0]))
    assert state.view().step == 4  # the last one waits: rank 1 may be slow, but not for ever
    state.handle(RankEnded(1, "finished", 1, 0.3))
    assert state.view().step == 5


def test_metrics_of_free_ranks_stand_at_the_rows_of_their_steps() -> None:
    state = free(2)
    state.handle(LogBatch(1, [1], [0.35], [{"staleness": 2.0}]))
    state.handle(LogBatch(0, [1, 2], [0.1, 0.2], [{"staleness": 0.0}, {"staleness": 2.0}]))
    state.handle(steps(0, 1, 2, time_s=[0.1, 0.2]))
    state.handle(steps(1, 1, 1, time_s=[0.35]))
    state.end("finished")
    assert state.history()["staleness"].tolist() == [0.0, 2.0, 2.0]
    assert state.view().staleness == ((0, 1), (2, 2))


def test_a_metric_of_a_free_rank_stands_in_its_own_row_whoever_ended_a_step_meanwhile() -> None:
    state = free(2)
    state.handle(steps(0, 1, 2, time_s=[0.1, 0.3]))
    state.handle(LogBatch(0, [0, 1, 2], [0.01, 0.05, 0.29], [{"a": 9.0}, {"a": 1.0}, {"a": 2.0}]))
    state.handle(LogBatch(1, [1], [0.31], [{"b": 3.0}]))  # its row is not there yet
    assert state.history()["step"].tolist() == []
    state.handle(steps(1, 1, 1, time_s=[0.2]))
    state.end("finished")
    history = state.history()
    assert history["a"].tolist() == pytest.approx([5.0, math.nan, 2.0], nan_ok=True)
    assert history["b"].tolist() == pytest.approx([math.nan, 3.0, math.nan], nan_ok=True)


def test_what_is_sent_now_and_then_counts_for_each_step() -> None:
    state = started(1)
    sent = [0.0] * 7 + [800.0]
    state.handle(steps(0, 1, 8, sent_bytes=sent, raw_bytes=sent))
    assert state.view().sent_bytes == 100.0
