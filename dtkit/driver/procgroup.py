"""The process group as the driver sees it: built, and built anew after a fault."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dtkit.cluster import Engines, Slot

__all__ = ["ProcessGroup"]


class ProcessGroup:
    """The one place that builds and rebuilds the group of a session's ranks.

    Args:
        engines: where the ranks live.
        slots: which rank has which device.
        backend: gloo or nccl.
    """

    def __init__(self, engines: Engines, slots: Sequence[Slot], backend: str) -> None:
        self.backend = backend
        self._engines = engines
        self._slots = tuple(slots)
        self.generation: int = 0
        """How many groups there have been; the present one's number."""
        self.is_debug: bool = False
        """Whether torch checks every collective against the other ranks'."""

    def build(self) -> dict[int, dict[str, Any]]:
        """Let every rank join a new group; returns what each says of itself, by rank.

        The store and its port are fresh: a store that served a group before may
        hang the next one.
        """
        world_size = len(self._slots)
        open_store = "dtkit.engine.process.group:open_store"
        address, port = self._engines.call(open_store, (world_size,), ranks=[0])[0]
        self.generation += 1
        specs = {
            slot.rank: (
                {
                    "rank": slot.rank,
                    "local_rank": slot.local_rank,
                    "world_size": world_size,
                    "device": slot.device,
                    "backend": self.backend,
                    "generation": self.generation,
                    "num_threads": slot.num_threads,
                    "address": address,
                    "port": port,
                    "host": slot.host,
                    "is_debug": self.is_debug,
                },
            )
            for slot in self._slots
        }
        return self._engines.call("dtkit.engine.process.group:join", specs)

    def take_over(self) -> dict[int, dict[str, Any]]:
        """Go on with the group that an earlier driver built; returns what `build` does.

        It is built anew if the ranks are not all in the same one. Answers while
        they are busy; ranks that do not answer are left out.
        """
        answers = self._engines.control("about")
        generations = {answer.get("generation", 0) for answer in answers.values()}
        self.generation = max(generations, default=0)
        if len(answers) == len(self._slots) and (len(generations) > 1 or not self.generation):
            return self.rebuild()
        return {rank: answer["facts"] for rank, answer in answers.items() if "facts" in answer}

    @contextmanager
    def debugging(self, is_wanted: bool) -> Iterator[None]:  # noqa: FBT001  reads well
        """Let the group check its collectives within the context: built anew before and after.

        Args:
            is_wanted: False changes nothing, nor does True in a session that checks anyway.
        """
        if not is_wanted or self.is_debug:
            yield
            return
        self.is_debug = True
        self.rebuild()
        try:
            yield
        finally:
            self.is_debug = False
            if not self._engines.is_closed and not self._engines.lost:
                self.rebuild()

    def rebuild(self) -> dict[int, dict[str, Any]]:
        """Leave the group and build it anew; the ranks keep their namespaces."""
        self.leave()
        return self.build()

    def leave(self, *, without: Sequence[int] = ()) -> None:
        """Let every rank that lives leave the group.

        Args:
            without: ranks that are not asked: they are to be ended, and may answer nothing.
        """
        away = {*self._engines.lost, *without}
        living = [slot.rank for slot in self._slots if slot.rank not in away]
        self._engines.call("dtkit.engine.process.group:leave", ranks=living)
