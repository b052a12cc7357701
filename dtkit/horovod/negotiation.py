"""Negotiation: which collective all ranks are ready for, and whether they mean the same.

Ranks name their tensors and may submit them in any order. A collective is
announced when every rank it needs has submitted it, to all ranks in one order,
so that what they then start matches. What cannot match is an error on all ranks
that wait, never a hang. Nothing here knows of sockets or of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dtkit.horovod.wire import Message

    Combine = Callable[[Message, list[memoryview]], memoryview]

__all__ = ["GLOBAL_SET", "Negotiation"]

GLOBAL_SET = 0
Key = tuple[int, str]  # process set, name

_ZEROS_DO = ("allreduce", "barrier")
"""What ranks that have joined can take part in by contributing zeros."""


class Negotiation:
    """What the ranks have submitted; answers are pairs of a rank and its message.

    A submission is `set`, `name`, `meta` (what the ranks must agree on; `kind`
    and `what` among it) and `extra` (what is each rank's own, told to all). It may have a
    `payload`, the tensor itself: then the answer has the payloads of all, combined.

    Args:
        size: number of ranks.
        combine: makes one payload of several, which are in the order of their ranks.
    """

    def __init__(self, size: int, combine: Combine | None = None) -> None:
        self._combine = combine
        self.sets: dict[int, tuple[int, ...]] = {GLOBAL_SET: tuple(range(size))}
        self._num_sets = 1
        self._pending: dict[Key, dict[int, Message]] = {}
        self._since_s: dict[Key, float] = {}
        self._warned: set[Key] = set()
        self._joined: list[int] = []
        self._gone: dict[int, str] = {}
        self._waiting: dict[int, Key] = {}

    def submit(self, rank: int, message: Message, now_s: float) -> Iterator[tuple[int, Message]]:
        """Take a rank's submission; yields what follows from it."""
        self._waiting.pop(rank, None)
        if message["meta"]["kind"] == "join":
            yield from self._join(rank, message)
            return
        key = (message["set"], message["name"])
        if key[0] not in self.sets:
            yield rank, _failed(key, f"process set {key[0]} was removed")
            return
        self._pending.setdefault(key, {})[rank] = message
        self._since_s.setdefault(key, now_s)
        yield from self._settle(key)

    def wait(self, rank: int, key: Key) -> Iterator[tuple[int, Message]]:
        """Note that a rank does nothing until `key` is settled; ends what can never be."""
        if key not in self._pending:
            return
        self._waiting[rank] = key
        yield from self._end_deadlock()

    def lose(self, rank: int, reason: str) -> Iterator[tuple[int, Message]]:
        """A rank is gone, such as by its process's end: fail what needs it."""
        self._gone[rank] = reason
        self._waiting.pop(rank, None)
        for key in list(self._pending):
            if rank in self.sets[key[0]]:
                yield from self._settle(key)
        if self._joined:
            for other in self._joined:
                yield other, _failed((GLOBAL_SET, "join"), f"rank {rank} {reason}")
            self._joined = []

    def stalled(self, now_s: float, after_s: float) -> Iterator[tuple[Key, str]]:
        """Yield what has waited longer than that, each once, with words for it."""
        for key, since_s in self._since_s.items():
            if now_s - since_s >= after_s and key not in self._warned:
                self._warned.add(key)
                yield key, self._stall_text(key, now_s - since_s)

    def expired(self, now_s: float, after_s: float) -> Iterator[tuple[int, Message]]:
        """Fail what has waited longer than that."""
        for key, since_s in list(self._since_s.items()):
            if now_s - since_s >= after_s:
                yield from self._fail(key, self._stall_text(key, now_s - since_s))

    def _end_deadlock(self) -> Iterator[tuple[int, Message]]:
        """Fail everything if all ranks wait: a waiting rank submits nothing."""
        idle = {*self._waiting, *self._joined, *self._gone}
        if self._waiting and idle >= set(self.sets[GLOBAL_SET]):
            text = "; ".join(f"rank {r} for {k[1]!r}" for r, k in sorted(self._waiting.items()))
            for stuck in list(self._pending):
                yield from self._fail(stuck, f"every rank waits, and not for the same: {text}")

    def _stall_text(self, key: Key, waited_s: float) -> str:
        here = self._pending[key]
        missing = [r for r in self.sets[key[0]] if r not in here and r not in self._joined]
        return (
            f"{key[1]!r} has waited {waited_s:.0f} s for {_ranks(missing)}; "
            f"{_ranks(sorted(here))} submitted it"
        )

    def _join(self, rank: int, message: Message) -> Iterator[tuple[int, Message]]:
        if self._gone:
            gone, reason = next(iter(self._gone.items()))
            yield rank, _failed((GLOBAL_SET, message["name"]), f"rank {gone} {reason}")
            return
        self._joined.append(rank)
        if len(self._joined) == len(self.sets[GLOBAL_SET]):
            joined, self._joined = self._joined, []
            for other in joined:
                yield other, _agreed((GLOBAL_SET, message["name"]), message["meta"], [rank], [])
            return
        for key in list(self._pending):
            yield from self._settle(key)
        yield from self._end_deadlock()

    def _settle(self, key: Key) -> Iterator[tuple[int, Message]]:
        """Announce a collective that all are ready for, or that it has failed."""
        here, members = self._pending[key], self.sets[key[0]]
        for rank in members:
            if rank in self._gone:
                yield from self._fail(key, f"rank {rank} {self._gone[rank]}")
                return
        if not here or any(r not in here and r not in self._joined for r in members):
            return
        disagreement = _disagreement(here)
        joined = [r for r in members if r not in here]
        kind = next(iter(here.values()))["meta"]["kind"]
        if disagreement:
            yield from self._fail(key, disagreement)
        elif joined and kind not in _ZEROS_DO:
            yield from self._fail(key, f"{kind} is not possible while {_ranks(joined)} has joined")
        else:
            self._forget(key)
            meta = self._apply(next(iter(here.values()))["meta"])
            extras = [here[r]["extra"] if r in here else None for r in members]
            answer = _agreed(key, meta, extras, joined)
            payloads = [here[r]["payload"] for r in members if "payload" in here.get(r, {})]
            if payloads and self._combine is not None:
                members = tuple(r for r in members if r in here)  # who has joined has no use for it
                answer = self._combined(key, answer, payloads, self._combine)
            for rank in members:
                yield rank, answer
            for orphan in [k for k in self._pending if k[0] not in self.sets]:
                yield from self._fail(orphan, f"process set {orphan[0]} was removed")

    @staticmethod
    def _combined(
        key: Key, answer: Message, payloads: list[memoryview], combine: Combine
    ) -> Message:
        try:
            return {**answer, "payload": combine(answer["meta"], payloads)}
        except Exception as error:  # noqa: BLE001  raised on all ranks, by what they are answered
            return _failed(key, f"rank 0 could not combine it: {type(error).__name__}: {error}")

    def _apply(self, meta: Message) -> Message:
        """Carry out what a settled request asks of the negotiation itself."""
        if meta["kind"] == "add_set":
            known = {ranks: number for number, ranks in self.sets.items()}
            number = known.get(tuple(meta["ranks"]), self._num_sets)
            self._num_sets = max(self._num_sets, number + 1)
            self.sets[number] = tuple(meta["ranks"])
            return {**meta, "set": number}
        if meta["kind"] == "remove_set":
            self.sets.pop(meta["set"], None)
        return meta

    def _fail(self, key: Key, reason: str) -> Iterator[tuple[int, Message]]:
        here = self._pending[key]
        self._forget(key)
        for rank in here:
            yield rank, _failed(key, reason)

    def _forget(self, key: Key) -> None:
        del self._pending[key]
        self._since_s.pop(key, None)
        self._warned.discard(key)
        self._waiting = {r: k for r, k in self._waiting.items() if k != key}


def _disagreement(here: dict[int, Message]) -> str:
    """Return in what the ranks disagree, empty if they do not."""
    (first, mine), *others = sorted((rank, m["meta"]) for rank, m in here.items())
    for rank, meta in others:
        for word in sorted(mine.keys() | meta.keys()):
            if mine.get(word) != meta.get(word):
                return (
                    f"mismatched {mine['kind']}: rank {first} has {word} {mine.get(word)}, "
                    f"rank {rank} has {word} {meta.get(word)}"
                )
    return ""


def _agreed(key: Key, meta: Message, extras: list[Any], joined: list[int]) -> Message:
    return {"set": key[0], "name": key[1], "meta": meta, "extras": extras, "joined": joined}


def _failed(key: Key, reason: str) -> Message:
    return {"set": key[0], "name": key[1], "error": reason}


def _ranks(ranks: Iterable[int]) -> str:
    listed = list(ranks)
    return f"rank{'' if len(listed) == 1 else 's'} {', '.join(map(str, listed))}"
