"""The wire format between ranks and driver."""

import json
import math

import pytest

from dtkit.events import (
    STEP_COLUMNS,
    Event,
    LogBatch,
    Note,
    RankEnded,
    RankStarted,
    StepBatch,
    Total,
    decode,
    encode,
    flush_interval_s,
    until_flush_s,
)


def batch(**columns: list[float]) -> StepBatch:
    return StepBatch(1, {name: columns.get(name, [0.0, 1.0]) for name in STEP_COLUMNS}, 7, 2)


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        RankStarted(0, 12, "host", "cpu", 1.5),
        batch(),
        LogBatch(0, [1, 2], [0.1, 0.2], [{"a": 1.0}, {"b": 2.0}]),
        Total(0, 100),
        Note(3, "«1 model broadcast» \n two lines"),
        RankEnded(1, "finished", 10, 2.5, {"skipped": 1}),
    ],
    ids=lambda event: type(event).__name__,
)
def test_every_event_survives_the_wire_and_the_file(event: Event, *, is_compact: bool) -> None:
    line = encode(event, is_compact=is_compact)
    assert b"\n" not in line
    assert decode(line) == event


@pytest.mark.parametrize("is_compact", [False, True])
def test_non_finite_numbers_are_strict_json_and_come_back(*, is_compact: bool) -> None:
    line = encode(batch(loss=[math.inf, -math.inf]), is_compact=is_compact)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    event = decode(line)
    assert isinstance(event, StepBatch)
    assert event.columns["loss"] == [math.inf, -math.inf]
    nan = decode(encode(LogBatch(0, [1], [0.0], [{"x": math.nan}])))
    assert isinstance(nan, LogBatch)
    assert math.isnan(nan.metrics[0]["x"])


@pytest.mark.parametrize("line", [b'{"event":"Unknown"}', b'{"a":1}', b'{"event":"Note","rnk":1}'])
def test_a_line_of_another_kind_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a dtkit event"):
        decode(line)


def test_a_column_of_equal_numbers_travels_as_one() -> None:
    nan = [math.nan] * 3
    sent = batch(step=[4.0, 5.0, 6.0], lr=[0.1] * 3, raw_bytes=nan, loss=[1.0, 1.0, 2.0])
    columns = json.loads(encode(sent))["columns"]
    assert (columns["lr"], columns["raw_bytes"]) == ([0.1], ["NaN"])
    assert len(json.loads(encode(sent, is_compact=True))["columns"]["lr"]) == 12  # of 8 bytes
    for is_compact in (False, True):
        event = decode(encode(sent, is_compact=is_compact))
        assert isinstance(event, StepBatch)
        assert event.columns["lr"] == [0.1] * 3
        assert event.columns["loss"] == [1.0, 1.0, 2.0]
        assert [math.isnan(value) for value in event.columns["raw_bytes"]] == [True] * 3


def test_ranks_send_at_the_same_moments_wherever_they_began() -> None:
    assert flush_interval_s(2) == 0.1
    assert flush_interval_s(64) == pytest.approx(0.8)
    assert flush_interval_s(1000) == 2.0
    for begun_s in (1000.0, 1000.3, 1000.79):
        at_s = begun_s + until_flush_s(0.8, begun_s)
        assert at_s % 0.8 == pytest.approx(0.0, abs=1e-9) or at_s % 0.8 == pytest.approx(0.8)
        early_s = at_s - 1e-6  # a timer that rang too soon does not send twice
        assert until_flush_s(0.8, early_s) == pytest.approx(0.8, abs=1e-3)
