"""What ranks ask each other in `async` and `gossip`: the bound, the mean, tickets."""

from __future__ import annotations

import socket
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dtkit.engine.loose.gossip import GossipHub
from dtkit.engine.loose.hub import Hub
from dtkit.engine.loose.mesh import FreedError, Mesh
from dtkit.engine.loose.server import ServerHub

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 60.0


class Server(ServerHub):
    """Says when somebody has to wait."""

    def __init__(self, bound: float) -> None:
        super().__init__(0, 3, bound)
        self.blocked = threading.Event()
        self.begin(1, torch.zeros(2))

    def _wait(self, is_time: Callable[[], bool]) -> None:
        if not is_time():
            self.blocked.set()
        super()._wait(is_time)

    def push(self, rank: int, version: int) -> dict[str, Any]:
        """Push an update of ones."""
        return self.answer(rank, {"ask": "update", "version": version}, torch.ones(2))[0]


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_a_rank_waits_before_it_makes_another_s_step_too_stale() -> None:
    server = Server(bound=2)
    server.push(0, 0)
    found: list[dict[str, Any]] = []
    fast = in_thread(lambda: found.extend(server.push(1, i) for i in range(4)))
    assert server.blocked.wait(WAIT_S)
    assert len(found) == 2  # as many as ranks 0 and 2 may lack
    slow = server.push(2, 0)
    assert slow["staleness"] == 3
    server.push(0, slow["version"])
    fast.join(WAIT_S)
    assert [reply["version"] for reply in found[:2]] == [2, 3]
    assert len(found) == 4


def test_a_step_that_waits_is_under_way_still() -> None:
    server = Server(bound=1)
    server.push(1, 0)
    waiting = in_thread(lambda: server.push(1, 1))  # for ranks 0 and 2
    assert server.blocked.wait(WAIT_S)
    server.blocked.clear()
    server.push(2, 0)
    also = in_thread(lambda: server.push(2, 2))  # for ranks 0 and 1: it would be 1's second
    assert server.blocked.wait(WAIT_S)
    server.push(0, 0)
    waiting.join(WAIT_S)
    also.join(WAIT_S)
    assert not waiting.is_alive()
    assert not also.is_alive()


def test_without_a_bound_nobody_waits() -> None:
    server = Server(bound=float("inf"))
    assert [server.push(1, 0)["staleness"] for _ in range(9)] == list(range(9))
    assert not server.blocked.is_set()


@pytest.mark.parametrize("how", ["dies", "steps aside", "arrives"])
def test_nobody_waits_for_a_rank_that(how: str) -> None:
    server = Server(bound=1)
    server.answer(0, {"ask": "aside"}, None)
    fast = in_thread(lambda: [server.push(1, 0), server.push(1, 1)])
    assert server.blocked.wait(WAIT_S)
    if how == "dies":
        server.lost(2)
    elif how == "steps aside":
        server.answer(2, {"ask": "aside"}, None)
    else:
        server.lost(0)
        server.lost(1)  # so that rank 2 is there alone
        server.answer(2, {"ask": "arrive", "where": "end"}, None)
    fast.join(WAIT_S)
    assert not fast.is_alive()


def test_a_rank_that_stepped_aside_is_waited_for_again_once_it_goes_on() -> None:
    server = Server(bound=1)
    server.answer(2, {"ask": "aside"}, None)  # to share its first weights, when rank 0 has begun
    arrivals = [
        in_thread(lambda r=r: server.answer(  # type: ignore[misc]  # mypy infers no default
            r, {"ask": "arrive", "where": "begin", "goes_on": True}, None
        ))
        for r in range(3)
    ]  # fmt: skip
    for thread in arrivals:
        thread.join(WAIT_S)
    server.answer(0, {"ask": "aside"}, None)  # so that rank 2 alone is waited for
    server.blocked.clear()
    fast = in_thread(lambda: [server.push(1, 0), server.push(1, 1)])
    assert server.blocked.wait(WAIT_S)
    assert server.push(2, 0)["staleness"] == 1
    fast.join(WAIT_S)
    assert not fast.is_alive()


def test_who_waits_can_be_freed() -> None:
    hub = Hub(0, 2)
    errors: list[BaseException] = []

    def arrive() -> None:
        try:
            hub.answer(0, {"ask": "arrive", "where": "end"}, None)
        except FreedError as error:
            errors.append(error)

    waiting = in_thread(arrive)
    hub.cut()
    waiting.join(WAIT_S)
    assert errors


def test_a_new_leader_goes_on_after_the_tickets_that_a_rank_has_seen() -> None:
    first, second = Hub(0, 3), Hub(1, 3)
    ask: dict[str, Any] = {"ask": "ticket", "pass": "0.1"}
    assert [first.answer(r, {**ask, "seen": r}, None)[0]["ticket"] for r in range(3)] == [3, 4, 5]
    second.lost(0)
    assert second.leader == 1
    assert second.answer(2, {**ask, "seen": 5}, None)[0]["ticket"] == 6
    assert second.answer(1, {**ask, "seen": 4}, None)[0]["ticket"] == 7


def test_the_first_weights_are_the_leader_s_once_it_has_come_to_the_same_place() -> None:
    hub, values = Hub(0, 3), torch.arange(3, dtype=torch.uint8)
    found: list[Any] = []
    ask = {"ask": "spread", "where": "1", "about": "(3,)torch.uint8"}
    early = in_thread(lambda: found.append(hub.answer(1, ask, None)))
    hub.offer("1", "(3,)torch.uint8", values)
    early.join(WAIT_S)
    ((reply, given),) = found
    assert reply == {"is_same": True}
    assert given is values
    assert hub.answer(2, {**ask, "about": "(4,)torch.uint8"}, None) == ({}, None)


def test_a_mesh_passes_over_strangers_and_tells_why_it_cannot_answer() -> None:
    def answer(_number: int, message: dict[str, Any], _vector: torch.Tensor | None) -> Any:
        return {"is": message["odd"]}, None

    host = one_of_two(0, answer)
    listener = Listener(("127.0.0.1", 0), authkey=b"secret")
    host._start(host._accept, listener)
    socket.create_connection(listener.address).close()
    with pytest.raises(AuthenticationError):
        Client(listener.address, authkey=b"another")
    visitor = one_of_two(1, answer)
    visitor._peers[0] = Client(listener.address, authkey=b"secret")
    visitor._peers[0].send_bytes(b"1")
    assert host._all_here.wait(WAIT_S)
    assert visitor.ask(0, {"odd": 3}) == {"is": 3}
    with pytest.raises(RuntimeError, match="rank 0 cannot answer 'x': KeyError: 'odd'"):
        visitor.ask(0, {"ask": "x"})
    visitor.close()
    host.close()


def one_of_two(rank: int, answer: Callable[..., Any]) -> Mesh:
    """Return a mesh of two ranks that is not connected yet."""
    mesh = object.__new__(Mesh)
    mesh.rank, mesh.size, mesh._answer = rank, 2, answer
    mesh._on_lost = lambda _number: None
    mesh._is_closed = mesh._is_cut = False
    mesh._served, mesh._threads, mesh._peers = [], [], {}
    mesh._all_here = threading.Event()
    return mesh


def test_gossip_leaves_the_mean_of_all_replicas_as_it_is() -> None:
    hubs = [GossipHub(rank, 3) for rank in range(3)]
    values = [torch.tensor([1.0, 10.0]), torch.tensor([2.0, 0.0]), torch.tensor([6.0, -4.0])]
    for hub, value in zip(hubs, values, strict=True):
        hub.begin(1, value)
    for visitor, host in ((0, 1), (1, 2), (0, 2), (2, 0)):
        hubs[visitor].take_in(values[visitor])
        message = {"ask": "mix", "generation": 1}
        change = hubs[host].answer(visitor, message, values[visitor])[1]
        assert change is not None
        values[visitor].sub_(change)
        hubs[visitor].gave(change)
    for hub, value in zip(hubs, values, strict=True):
        hub.take_in(value)
    assert torch.stack(values).mean(0).tolist() == pytest.approx([3.0, 2.0])
    assert torch.stack(values).std(0).max() < 3.0
