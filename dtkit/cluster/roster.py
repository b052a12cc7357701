"""Roster: which rank lives on which engine, who of them is there, and how the others ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipyparallel.error import NoEnginesRegistered

from dtkit.errors import EngineDiedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dtkit.cluster.placement import Slot

__all__ = ["HAS_LEFT", "Roster"]

HAS_LEFT = "its engine has left the cluster"
"""How an engine ended of which no more is known."""

# Any, below: ipyparallel's client carries no types.


class Roster:
    """The engines of one cluster by rank, alive and lost. Safe to use from any thread.

    Args:
        client: a connected `ipyparallel.Client`.
        slots: which rank lives on which engine.
    """

    def __init__(self, client: Any, slots: Sequence[Slot]) -> None:
        self._client = client
        self.host_of: dict[int, str] = {slot.rank: slot.host for slot in slots}
        """What the user calls each rank's host; empty for that of the driver."""
        self._engine_of = {slot.rank: slot.engine for slot in slots}
        self._rank_of = {slot.engine: slot.rank for slot in slots}
        self._lost: dict[int, str] = {}
        self._final: set[int] = set()
        self._replaced: dict[int, str] = {}
        self._broken = ""
        self._wake: Callable[[], None] = lambda: None
        self.on_left: Callable[[int], None] = self._note_left
        """Called on the client's own thread with a rank whose engine has left the controller."""
        client._registration_callbacks.append(self._on_registration)  # noqa: SLF001  no public way

    @property
    def client(self) -> Any:
        """The connection, for others that are reached over the same controller."""
        return self._client

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank, alive or not."""
        return tuple(sorted(self._engine_of))

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks whose engine has gone."""
        return tuple(sorted(self._lost))

    def death_of(self, rank: int) -> str:
        """Return how a rank's engine ended last, with its last words; a new one may be there."""
        return self._lost.get(rank) or self._replaced.get(rank, "its engine ended")

    def can_return(self, ranks: Iterable[int]) -> bool:
        """Whether new engines can be started for these ranks."""
        return not self._final & set(ranks)

    def remedy(self, ranks: Iterable[int]) -> str:
        """Return what to do about lost ranks."""
        if not self.can_return(ranks):
            return (
                "%dist_pull what the others hold, %dist_shutdown, and %dist_init without that host"
            )
        return f"%dist_restart {','.join(map(str, ranks))} puts a new engine in its place"

    @property
    def broken(self) -> str:
        """Why no engine can be reached any more; empty if they can."""
        return self._broken

    def note_death(self, rank: int, text: str, *, is_final: bool = False) -> None:
        """Count a rank's engine as lost, and finally so where no other can be started."""
        self._lost[rank] = text
        if is_final:
            self._final.add(rank)
        self._wake()

    def note_return(self, ranks: Iterable[int]) -> None:
        """Count ranks as there again: each has a new engine."""
        for rank in ranks:
            if rank in self._lost:
                self._replaced[rank] = self._lost.pop(rank)

    def note_breakdown(self, text: str) -> None:
        """Note that no engine can be reached any more; what waits for one is told."""
        self._broken = text
        for rank in self._engine_of:
            self._lost.setdefault(rank, text)
        self._wake()

    def are_registered(self, ranks: Iterable[int] | None = None) -> bool:
        """Whether the engines of these ranks (all by default) are known to the controller."""
        wanted = {self._engine_of[rank] for rank in (self.ranks if ranks is None else ranks)}
        return wanted <= set(self._client.ids)

    def are_gone(self, ranks: Iterable[int]) -> bool:
        """Whether the controller has forgotten the engines of these ranks."""
        return not {self._engine_of[rank] for rank in ranks} & set(self._client.ids)

    def note_missing(self) -> None:
        """Count engines that are not registered now as lost: for a cluster that was running."""
        there = set(self._client.ids)
        for rank, engine in self._engine_of.items():
            if engine not in there:
                self._lost.setdefault(rank, "its engine ended before this kernel attached")

    def _address(self, rank: int) -> bytes | None:
        """Return where messages to a rank go; None if its engine has just left, which is noted."""
        try:
            idents, _ = self._client._build_targets(self._engine_of[rank])  # noqa: SLF001
        except (IndexError, NoEnginesRegistered):  # `_on_registration` is called a moment later
            self._note_left(rank)
            return None
        return bytes(idents[0])

    def _on_registration(self, event: dict[str, Any]) -> None:
        if event["event"] == "unregister":
            rank = self._rank_of.get(int(event["id"]))
            if rank is not None:
                self.on_left(rank)

    def _note_left(self, rank: int) -> None:
        if rank not in self._lost:
            self.note_death(rank, HAS_LEFT)

    def _check_alive(self, ranks: Iterable[int]) -> None:
        gone = sorted(set(self._lost) & set(ranks))
        if gone:
            words = "; ".join(f"rank {rank}: {self._lost[rank]}" for rank in gone)
            msg = f"{words}\n{self.remedy(gone)}"
            raise EngineDiedError(msg)
