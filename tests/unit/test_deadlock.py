"""Deadlock: told apart from ranks that compute, and from collectives that are under way."""

from __future__ import annotations

from typing import Any

import pytest

from dtkit.driver import deadlock
from dtkit.driver.deadlock import Deadlock

# Any: JSON.
WORLD = "0 gloo"


def waits(sequence: int, ranks: list[int], *, group: str = WORLD, what: str = "all_reduce") -> Any:
    """Answer as a rank that waits in its newest collective."""
    wait = {"group": group, "sequence": sequence, "operation": what, "ranks": ranks}
    return {"waits": wait, "came": {WORLD: [1, "all_reduce"], group: [sequence, what]}}


def computes(sequence: int) -> Any:
    """Answer as a rank that is in no collective, the newest having this number."""
    return {"waits": None, "came": {WORLD: [sequence, "all_reduce"]}}


class Engines:
    """Answers what it is given."""

    def __init__(self, answers: dict[int, Any]) -> None:
        self.answers = answers

    def control(self, _operation: str, *, ranks: Any, timeout_s: float) -> dict[int, Any]:
        assert timeout_s < 1
        return {rank: self.answers[rank] for rank in ranks if rank in self.answers}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlock, "_LOOK_EVERY_S", 0.0)


def is_found(answers: dict[int, Any], running: list[int], ended: list[int]) -> bool:
    found = Deadlock(Engines(answers))  # type: ignore[arg-type]
    first, second = (found.look(running, ended) for _ in range(2))
    assert not first
    return second


BOTH, THREE = [0, 1], [0, 1, 2]


@pytest.mark.parametrize(
    ("answers", "running", "ended"),
    [
        pytest.param({0: waits(4, BOTH), 1: computes(3)}, [0], [1], id="ended"),
        pytest.param(
            {0: waits(4, BOTH), 1: waits(4, BOTH, what="broadcast")}, BOTH, [], id="another"
        ),
        pytest.param(
            {0: waits(4, THREE), 1: waits(2, BOTH, group="1 gloo"), 2: computes(3)}, BOTH, [2],
            id="crossed",
        ),
    ],
)  # fmt: skip
def test_ranks_that_can_never_go_on(answers: Any, running: list[int], ended: list[int]) -> None:
    assert is_found(answers, running, ended)


@pytest.mark.parametrize(
    ("answers", "running", "ended"),
    [
        pytest.param({0: waits(4, BOTH), 1: computes(4)}, [0], [1], id="under-way"),
        pytest.param({0: waits(4, BOTH), 1: computes(7)}, [0], [1], id="further"),
        pytest.param({0: waits(4, BOTH), 1: computes(3)}, BOTH, [], id="computing"),
        pytest.param({0: waits(4, BOTH)}, BOTH, [], id="no-answer"),
        pytest.param({0: waits(4, []), 1: computes(3)}, [0], [1], id="unknown-group"),
        pytest.param(
            {0: waits(1, BOTH, group="1 gloo"), 1: waits(1, BOTH, group="1 gloo"), 2: computes(3)},
            BOTH, [2], id="among-themselves",
        ),
    ],
)  # fmt: skip
def test_ranks_that_may_still_go_on(answers: Any, running: list[int], ended: list[int]) -> None:
    assert not is_found(answers, running, ended)


def test_a_rank_that_has_gone_on_between_two_looks_may_again() -> None:
    engines = Engines({0: waits(4, BOTH), 1: computes(3)})
    found = Deadlock(engines)  # type: ignore[arg-type]
    assert not found.look([0], [1])
    engines.answers[0] = waits(5, BOTH)
    assert not found.look([0], [1])
    assert found.look([0], [1])
