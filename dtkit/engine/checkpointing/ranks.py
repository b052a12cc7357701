"""How the ranks of a checkpoint talk: together on the training thread, and apart while they write.

The writing threads must not use collectives: those of the training would meet
them. They leave words for each other in the group's store.
"""

from __future__ import annotations

import json
import platform
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dtkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ranks", "reason"]

# Any, below: JSON, and the values that ranks exchange.

_POLL_S = 0.02
_STALL_TIMEOUT_S = 60.0
"""A rank that says nothing and writes nothing for so long is taken for dead."""


class Ranks:
    """The ranks that write checkpoints together.

    Args:
        group: a process group, None if this process is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group) if group is not None else 0
        self.numbers: list[int] = dist.get_process_group_ranks(group) if group is not None else [0]
        """Of the ranks in the whole group."""
        self.num: int = len(self.numbers)
        # The group's own: a rebuilt group has another, and ours lives on with this reference.
        self._store: Any = (
            dist.distributed_c10d._get_default_store() if self.num > 1 else None  # noqa: SLF001
        )

    def together(self, make: Callable[[], Any]) -> list[Any]:
        """Return what `make` gives on each rank; a collective, on the training thread.

        Raises:
            CheckpointError: it raised on some rank; on all of them, so that no rank is alone.
        """
        try:
            mine: tuple[Any, str] = make(), ""
        except Exception as error:  # noqa: BLE001  it is told on every rank
            mine = None, reason(error)
        found: list[Any] = [mine]
        if self._group is not None:
            found = [None] * self.num
            dist.all_gather_object(found, mine, group=self._group)
        self._check([{"error": error} for _, error in found])
        return [value for value, _ in found]

    def conclude(
        self,
        topic: str,
        word: dict[str, Any],
        commit: Callable[[list[dict[str, Any]]], None],
        progress: Callable[[], int],
    ) -> None:
        """Hand in this rank's word, and return when rank 0 has committed what all handed in.

        Args:
            topic: the same on all ranks, and used once.
            word: JSON; has `error` if this rank failed.
            commit: called on rank 0 with every rank's word.
            progress: changes as long as ranks are writing.

        Raises:
            CheckpointError: a rank failed, or says nothing any more.
        """
        if self.rank:
            self._set(topic, str(self.rank), word)
            self._check([self._take(topic, "verdict", progress)])
            return
        try:
            words = [word, *(self._take(topic, str(r), progress) for r in range(1, self.num))]
            self._check(words)
            commit(words)
        except Exception as error:
            self._set(topic, "verdict", {"error": self._text(error), "is_told": True})
            raise
        self._set(topic, "verdict", {})

    def _set(self, topic: str, key: str, word: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.set(f"dtkit/{topic}/{key}", json.dumps(word))

    def _take(self, topic: str, key: str, progress: Callable[[], int]) -> dict[str, Any]:
        name = f"dtkit/{topic}/{key}"
        seen, changed_s = progress(), time.monotonic()
        # Not a blocking get: it would keep the training thread from the store.
        while not self._store.check([name]):
            now = progress()
            if now != seen:
                seen, changed_s = now, time.monotonic()
            if time.monotonic() - changed_s > _STALL_TIMEOUT_S:
                number = self.numbers[int(key) if key.isdigit() else 0]
                msg = f"rank {number} wrote nothing for {_STALL_TIMEOUT_S:g} s"
                raise CheckpointError(msg)
            time.sleep(_POLL_S)
        word: dict[str, Any] = json.loads(self._store.get(name))
        return word

    def _check(self, words: list[dict[str, Any]]) -> None:
        texts = [
            word["error"] if word.get("is_told") else f"rank {number}: {word['error']}"
            for number, word in zip(self.numbers, words, strict=False)
            if word.get("error")
        ]
        if texts:
            raise CheckpointError("; ".join(texts))

    def _text(self, error: Exception) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        return f"rank {self.numbers[0]}: {reason(error)}"


def reason(error: BaseException) -> str:
    """Return what went wrong: the system's own words where there are any.

    torch's writer, in C++, reports a failed write as a position that is not what it expected.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    told = found or error
    if isinstance(told, FileNotFoundError):
        return (
            f"{told.filename} is not on {platform.node()}: checkpoints need a folder that all "
            "hosts see (%config DistMagics.runs_dir)"
        )
    return str(told) if isinstance(told, CheckpointError) else f"{type(told).__name__}: {told}"
