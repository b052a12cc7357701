"""A cell that was sent to ranks: who has answered, and who is gone."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from ipyparallel.error import EngineError

from dtkit.cluster import execution
from dtkit.cluster.execution import Execution
from dtkit.cluster.roster import HAS_LEFT

# Any: ipyparallel's futures carry no types.


def ended(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def test_a_rank_has_died_when_the_roster_knows_it_too() -> None:
    lost: dict[int, str] = {}
    cell = Execution((0, 1), {0: ended({}), 1: ended(EngineError("died"))}, lost)
    assert not cell.poll()
    assert cell.running == (1,)
    lost[1] = "its engine was killed by SIGKILL"
    assert cell.poll()
    assert (cell.replies[1].status, cell.replies[1].evalue) == ("died", lost[1])


def test_a_rank_has_died_though_the_roster_never_hears_of_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(execution, "_ROSTER_S", -1.0)
    lost: dict[int, str] = {}
    cell = Execution((0,), {0: ended(EngineError("died"))}, lost)
    assert cell.poll()
    assert lost == {0: HAS_LEFT}


def test_a_rank_that_the_roster_has_lost_answers_no_more() -> None:
    cell = Execution((0,), {0: Future()}, {0: "its host is gone"})
    assert cell.poll()
    assert cell.replies[0].ename == "EngineDied"
