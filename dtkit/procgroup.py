"""The process group as the driver sees it: built, and built anew after a fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        self._generation = 0

    def build(self) -> dict[int, dict[str, Any]]:
        """Let every rank join a new group; returns what each says of itself, by rank.

        The store and its port are fresh: a store that served a group before may
        hang the next one.
        """
        world_size = len(self._slots)
        port = self._engines.call("dtkit.engine.group:open_store", (world_size,), ranks=[0])[0]
        self._generation += 1
        specs = {
            slot.rank: (
                {
                    "rank": slot.rank,
                    "local_rank": slot.local_rank,
                    "world_size": world_size,
                    "device": slot.device,
                    "backend": self.backend,
                    "generation": self._generation,
                    "num_threads": slot.num_threads,
                    "port": port,
                },
            )
            for slot in self._slots
        }
        return self._engines.call("dtkit.engine.group:join", specs)

    def take_over(self) -> dict[int, dict[str, Any]]:
        """Go on with the group that an earlier driver built; returns what `build` does.

        It is built anew if the ranks are not all in the same one. Answers while
        they are busy; ranks that do not answer are left out.
        """
        answers = self._engines.control("about")
        generations = {answer.get("generation", 0) for answer in answers.values()}
        self._generation = max(generations, default=0)
        if len(answers) == len(self._slots) and (len(generations) > 1 or not self._generation):
            self._engines.call("dtkit.engine.group:leave")
            return self.build()
        return {rank: answer["facts"] for rank, answer in answers.items() if "facts" in answer}

    def rebuild(self) -> None:
        """Leave the group and build it anew; the ranks keep their namespaces."""
        self._engines.call("dtkit.engine.group:leave")
        self.build()
