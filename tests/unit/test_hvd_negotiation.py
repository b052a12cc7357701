"""What ranks agree on, and what they are told when they do not."""

from __future__ import annotations

from typing import Any

from dtkit.horovod.negotiation import Negotiation

ANSWERS = list[tuple[int, dict[str, Any]]]


def submit(
    negotiation: Negotiation,
    rank: int,
    name: str,
    *,
    kind: str = "allreduce",
    process_set: int = 0,
    extra: Any = None,
    payload: bytes | None = None,
    now_s: float = 0.0,
    **meta: Any,
) -> ANSWERS:
    message = {
        "set": process_set, "name": name, "meta": {"kind": kind, **meta}, "extra": extra,
    }  # fmt: skip
    if payload is not None:
        message["payload"] = memoryview(payload)
    return list(negotiation.submit(rank, message, now_s))


def told(answers: ANSWERS) -> dict[int, str]:
    """Return the errors, by rank."""
    return {rank: message["error"] for rank, message in answers}


def test_what_all_have_submitted_is_announced_to_all_in_one_order() -> None:
    negotiation = Negotiation(2)
    assert submit(negotiation, 0, "a", extra=10) == []
    assert submit(negotiation, 0, "b") == []
    assert [r for r, m in submit(negotiation, 1, "b") if m["name"] == "b"] == [0, 1]
    answers = submit(negotiation, 1, "a", extra=11)
    assert [(r, m["name"], m["extras"], m["joined"]) for r, m in answers] == [
        (0, "a", [10, 11], []),
        (1, "a", [10, 11], []),
    ]


def test_payloads_are_combined_once_in_the_order_of_their_ranks() -> None:
    combined = []

    def joined(meta: dict[str, Any], payloads: list[memoryview]) -> memoryview:
        combined.append(meta["kind"])
        return memoryview(b"".join(payloads))

    negotiation = Negotiation(4, joined)
    submit(negotiation, 1, "join", kind="join")
    for rank in (3, 0):
        submit(negotiation, rank, "a", payload=b"%d" % rank)
    answers = submit(negotiation, 2, "a", payload=b"2")
    assert [(rank, bytes(message["payload"])) for rank, message in answers] == [
        (rank, b"023") for rank in (0, 2, 3)
    ]
    submit(negotiation, 0, "b", payload=b"0", shape=[1])
    submit(negotiation, 2, "b", payload=b"0", shape=[2])
    assert set(told(submit(negotiation, 3, "b", payload=b"0", shape=[1]))) == {0, 2, 3}
    assert combined == ["allreduce"]


def test_what_cannot_be_combined_is_an_error_on_every_rank() -> None:
    def fails(_meta: dict[str, Any], payloads: list[memoryview]) -> memoryview:
        raise MemoryError(len(payloads))

    negotiation = Negotiation(2, fails)
    submit(negotiation, 0, "a", payload=b"0")
    errors = told(submit(negotiation, 1, "a", payload=b"1"))
    assert errors == dict.fromkeys((0, 1), "rank 0 could not combine it: MemoryError: 2")


def test_a_disagreement_is_an_error_on_every_rank_and_says_what_each_had() -> None:
    negotiation = Negotiation(2)
    submit(negotiation, 0, "w", shape=[3])
    errors = told(submit(negotiation, 1, "w", shape=[4]))
    assert set(errors) == {0, 1}
    assert errors[0] == "mismatched allreduce: rank 0 has shape [3], rank 1 has shape [4]"


def test_a_joined_rank_takes_part_in_all_reduces_and_nothing_else() -> None:
    negotiation = Negotiation(3)
    submit(negotiation, 2, "join", kind="join")
    submit(negotiation, 0, "g")
    answers = submit(negotiation, 1, "g")
    assert [(rank, message["joined"]) for rank, message in answers] == [
        (0, [2]),
        (1, [2]),
        (2, [2]),
    ]
    submit(negotiation, 0, "h", kind="allgather")
    errors = told(submit(negotiation, 1, "h", kind="allgather"))
    assert errors == dict.fromkeys((0, 1), "allgather is not possible while rank 2 has joined")


def test_the_last_to_join_is_told_to_all() -> None:
    negotiation = Negotiation(3)
    submit(negotiation, 2, "join", kind="join")
    submit(negotiation, 0, "join", kind="join")
    answers = submit(negotiation, 1, "join", kind="join")
    assert {rank: message["extras"] for rank, message in answers} == {0: [1], 1: [1], 2: [1]}


def test_ranks_that_all_wait_for_different_names_get_an_error() -> None:
    negotiation = Negotiation(2)
    submit(negotiation, 0, "a")
    submit(negotiation, 1, "b")
    assert list(negotiation.wait(0, (0, "a"))) == []
    errors = told(list(negotiation.wait(1, (0, "b"))))
    assert set(errors) == {0, 1}
    assert errors[0].endswith("rank 0 for 'a'; rank 1 for 'b'")


def test_a_rank_that_goes_on_is_not_waiting() -> None:
    negotiation = Negotiation(2)
    submit(negotiation, 0, "a")
    submit(negotiation, 1, "b")
    list(negotiation.wait(0, (0, "a")))
    assert len(submit(negotiation, 1, "a")) == 2
    assert list(negotiation.wait(1, (0, "b"))) == []


def test_a_rank_that_is_gone_fails_what_needs_it_now_and_later() -> None:
    negotiation = Negotiation(2)
    submit(negotiation, 0, "a")
    assert told(list(negotiation.lose(1, "is gone"))) == {0: "rank 1 is gone"}
    assert told(submit(negotiation, 0, "b")) == {0: "rank 1 is gone"}
    assert told(submit(negotiation, 0, "join", kind="join")) == {0: "rank 1 is gone"}


def test_a_stall_is_named_once_and_can_be_ended() -> None:
    negotiation = Negotiation(3)
    submit(negotiation, 0, "a", now_s=0.0)
    submit(negotiation, 2, "a", now_s=1.0)
    assert list(negotiation.stalled(59.0, 60.0)) == []
    ((_, text),) = negotiation.stalled(60.0, 60.0)
    assert text == "'a' has waited 60 s for rank 1; ranks 0, 2 submitted it"
    assert list(negotiation.stalled(61.0, 60.0)) == []
    assert set(told(list(negotiation.expired(90.0, 90.0)))) == {0, 2}


def test_a_process_set_needs_its_own_ranks_only() -> None:
    negotiation = Negotiation(3)
    for rank in range(3):
        answers = submit(negotiation, rank, "add", kind="add_set", ranks=[0, 2])
    assert answers[0][1]["meta"]["set"] == 1
    submit(negotiation, 0, "a", process_set=1)
    assert [rank for rank, _ in submit(negotiation, 2, "a", process_set=1)] == [0, 2]
    submit(negotiation, 2, "late", process_set=1)
    for rank in range(3):
        answers = submit(negotiation, rank, "remove", kind="remove_set", set=1)
    assert answers[-1][1]["name"] == "late"
    assert told(answers[-1:]) == {2: "process set 1 was removed"}
    assert told(submit(negotiation, 0, "a", process_set=1)) == {0: "process set 1 was removed"}
    assert list(negotiation.lose(0, "is gone")) == []
