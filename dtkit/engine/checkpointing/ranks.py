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

from dtkit._ranks import format_ranks
from dtkit.checkpoint_files import Manifest, newest
from dtkit.errors import CheckpointError, DtkitError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
        cause = None
        try:
            mine: tuple[Any, str] = make(), ""
        except Exception as error:  # noqa: BLE001  it is told on every rank
            mine, cause = (None, reason(error)), error
        found: list[Any] = [mine]
        if self._group is not None:
            found = [None] * self.num
            dist.all_gather_object(found, mine, group=self._group)
        try:
            self._check([{"error": error} for _, error in found])
        except CheckpointError as error:
            # The user's own frames, where there may be some.
            raise error from (None if isinstance(cause, DtkitError) else cause)
        return [value for value, _ in found]

    def each(self, make: Callable[[], Any]) -> Any:
        """Return what `make` gives on this rank, once it has given something on all of them.

        Raises:
            CheckpointError: it raised on some rank; on all of them. Alone: what it raised.
        """
        if self.num == 1:
            return make()
        made: list[Any] = []
        self.together(lambda: made.append(make()))
        return made[0]

    def agreed(self, folder: Path) -> Path:
        """Return the newest whole checkpoint of a folder, as the first rank that asks sees it.

        Each by itself might choose another while one is being written. A collective.

        Raises:
            CheckpointError: there is none, or a rank does not see that one; on all ranks.
        """
        chosen: dict[Path, Path | None] = {}
        for asked, found in self.together(lambda: (folder, newest(folder))):
            chosen.setdefault(asked, found)
        missing = [str(asked) for asked, found in chosen.items() if found is None]
        if missing:
            msg = f"dtkit.resume: no whole checkpoint in {', '.join(missing)}"
            raise CheckpointError(msg)
        path = chosen[folder]
        assert path is not None  # noqa: S101  for the type checker: none is missing
        seen: dict[Path, Manifest] = {}
        for asked, manifest in self.together(lambda: (path, Manifest.read(path))):
            if seen.setdefault(asked, manifest) != manifest:
                msg = f"{asked} is not the same on all ranks: it needs a folder that all hosts see"
                raise CheckpointError(msg)
        return path

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
        by_text: dict[str, list[int]] = {}
        for number, word in zip(self.numbers, words, strict=False):
            if word.get("error"):
                by_text.setdefault(word["error"], []).append(number)
        is_told = any(word.get("is_told") for word in words)
        texts = [
            text if is_told or 1 < len(ranks) == self.num else f"{format_ranks(ranks)}: {text}"
            for text, ranks in by_text.items()
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
    return str(told) if isinstance(told, DtkitError) else f"{type(told).__name__}: {told}"
