"""A rank that is busy, or stuck, says where it is."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from dtkit._where import describe_all

if TYPE_CHECKING:
    from collections.abc import Callable

    import dtkit

SETUP = """
import threading, time
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
gate = threading.Event()
model = DistributedDataParallel(nn.Linear(2, 2))
x = torch.ones(1, 2)
"""
WAIT = "if rank == 1:\n    gate.wait()\n"  # rank 1 is then on line 2


def places_when(
    session: dtkit.Session, cell: str, is_there: Callable[[dict[int, dict[str, Any]]], bool]
) -> dict[int, dict[str, Any]]:
    """Run a cell, wait until the ranks are where they should be, and end it."""
    _, requests, steps = session.running(cell)
    try:
        while True:
            next(steps)
            places = session._engines.control("where")
            if is_there(places):
                return places
            threading.Event().wait(0.01)
    finally:
        requests.interrupt()
        requests.interrupt()
        for _ in steps:
            threading.Event().wait(0.01)


def states(places: dict[int, dict[str, Any]]) -> list[str]:
    return [place["state"] for place in places.values()]


@pytest.fixture(scope="module")
def prepared(session2: dtkit.Session) -> dtkit.Session:
    """Two ranks with a model."""
    session2.execute(SETUP)
    return session2


@pytest.mark.parametrize(
    ("line", "operation", "is_numbered"),
    [
        ("dist.all_reduce(torch.ones(1))", "all_reduce", True),
        ("dist.recv(torch.ones(1), src=1)", "recv", False),
        ("dist.all_gather_object([None, None], 1)", "all_gather_object", True),
        ("dist.all_reduce(torch.ones(1), async_op=True).wait()", "all_reduce", True),
    ],
)
def test_a_rank_in_a_collective_says_which(
    prepared: dtkit.Session, line: str, operation: str, is_numbered: object
) -> None:
    def is_there(places: dict[int, dict[str, Any]]) -> bool:
        if states(places) != ["collective", "python"]:
            return False
        # In the function already, a rank may not have come to the collective itself.
        return places[0]["sequence"] is not None or not is_numbered

    places = places_when(prepared, f"{WAIT}\n{line}", is_there)
    assert (places[0]["operation"], places[0]["line"]) == (operation, 4)
    assert (places[0]["sequence"] is not None) == is_numbered
    assert (places[1]["state"], places[1]["line"]) == ("python", 2)


def test_a_rank_that_waits_in_horovods_layer_says_for_what_and_since_when(
    prepared: dtkit.Session,
) -> None:
    prepared.execute("import horovod.torch as hvd\nhvd.init()")
    cell = f"if rank == 0: time.sleep(0.5)\n{WAIT}\nhvd.allreduce(x, name='x')"
    places = places_when(prepared, cell, lambda found: states(found) == ["collective", "python"])
    assert (places[0]["operation"], places[0]["line"]) == ("hvd allreduce.x", 5)
    assert places[0]["seconds"] < places[1]["seconds"] - 0.4


def test_ddp_waits_in_its_backward(prepared: dtkit.Session) -> None:
    prepared.execute("model = DistributedDataParallel(nn.Linear(2, 2))")
    cell = f"{WAIT}\nmodel(x).sum().backward()"
    places = places_when(prepared, cell, lambda places: states(places) == ["collective", "python"])
    assert (places[0]["operation"], places[0]["line"]) == ("all_reduce", 4)


def test_a_rank_that_waits_for_data(prepared: dtkit.Session) -> None:
    cell = (
        "def collate(batch):\n    gate.wait()\nfor b in DataLoader([1], collate_fn=collate): pass"
    )
    # The loader comes first (line 3), then what it calls.
    seen = [("data", 2), ("data", 2)]
    places_when(
        prepared,
        cell,
        lambda places: [(place["state"], place["line"]) for place in places.values()] == seen,
    )


def test_an_idle_rank(prepared: dtkit.Session) -> None:
    places = prepared._engines.control("where")
    assert states(places) == ["idle", "idle"]
    assert places[0]["line"] is None


def test_a_frame_without_a_line_is_looked_at_too(prepared: dtkit.Session) -> None:
    """Python 3.11 has such instructions, for an instant: at the end of a `with`."""
    cell = """\
from types import SimpleNamespace
from dtkit.engine.process import where
code = SimpleNamespace(co_name='run', co_filename='/cell.py')
where._may_wait([SimpleNamespace(f_code=code, f_lineno=None)])
"""
    assert prepared.execute(cell).results == {0: "False", 1: "False"}


def test_whoever_has_not_arrived_is_named(prepared: dtkit.Session) -> None:
    said = ""

    def is_told(_places: object) -> bool:
        nonlocal said
        said = describe_all(prepared.where())
        return bool(said)

    places_when(prepared, f"{WAIT}\ndist.all_reduce(x)", is_told)
    assert said.startswith("rank 1 has not arrived: rank 0 waits in all_reduce #")
    assert "rank 1 is in Python (cell line 2, " in said
    assert [place.state for place in prepared.where()] == ["idle", "idle"]


def test_one_interrupt_is_enough_when_a_rank_has_ended_the_cell(prepared: dtkit.Session) -> None:
    cell = "while rank == 0:\n    dist.all_reduce(torch.ones(1))"
    _, requests, steps = prepared.running(cell)
    for _ in steps:
        places = prepared._engines.control("where")
        if states(places) == ["collective", "idle"] and not requests.num_interrupts:
            requests.interrupt()
        threading.Event().wait(0.01)
    assert requests.num_interrupts == 1
    assert "rank 0 was in all_reduce (cell line 2) and was released" in requests.outcome
    assert prepared.execute("dist.get_world_size()").results == {0: "2", 1: "2"}
