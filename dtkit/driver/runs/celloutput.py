"""CellOutput: what a cell shows on the ranks, taken from their messages as they come."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from dtkit.events import decode
from dtkit.output import Display, OutputBlock, RankOutput, merge_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dtkit.events import Event

__all__ = ["CellOutput"]

_MERGE_WAIT_S = 0.5
"""How long a display waits for the same one of other ranks before it is shown alone."""


class CellOutput:
    """Collects text, displays and events of one cell.

    `on_message` is called on the client's own thread, the rest by the driver.

    Args:
        ranks: where the cell runs.
        on_event: called with each telemetry event, on the client's thread.
    """

    def __init__(
        self, ranks: Iterable[int], on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._texts = {rank: RankOutput() for rank in ranks}
        self._displays: dict[int, deque[tuple[float, dict[str, Any], dict[str, Any]]]] = {
            rank: deque() for rank in self._texts
        }
        self.results: dict[int, str] = {}
        """What the cell's last expression gave, as text, by rank."""
        self.num_changes: int = 0
        """Grows with everything that was shown: a renderer may compare it."""

    def on_message(self, rank: int, message: dict[str, Any]) -> None:
        """Take one message of the cell."""
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "dtkit_events":
            if self._on_event:
                for line in bytes(message["buffers"][0]).split(b"\n"):
                    self._on_event(decode(line))
            return
        with self._lock:
            self._take(rank, kind, content)

    def blocks(self) -> tuple[OutputBlock, ...]:
        """Return the text so far, equal texts merged."""
        with self._lock:
            return merge_output(self._texts)

    def text_of(self, rank: int) -> str:
        """Return everything a rank printed."""
        with self._lock:
            return self._texts[rank].text

    def take_displays(self, *, is_final: bool = False) -> list[Display]:
        """Return the displays that are ready, equal ones of different ranks as one.

        The n-th display of one rank is compared with the n-th of the others. A
        rank that is late holds the others up for half a second, not longer.
        """
        ready = []
        with self._lock:
            while True:
                heads = {rank: queue[0] for rank, queue in self._displays.items() if queue}
                if not heads:
                    break
                oldest = min(time_s for time_s, _, _ in heads.values())
                is_late = time.monotonic() - oldest > _MERGE_WAIT_S
                if len(heads) < len(self._displays) and not is_late and not is_final:
                    break
                ready += _merged(heads)
                for rank in heads:
                    self._displays[rank].popleft()
        return ready

    def _take(self, rank: int, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            self._texts[rank].write(content["text"])
        elif kind == "clear_output":
            self._texts[rank].clear()
            self._displays[rank].clear()
        elif kind == "execute_result":
            self.results[rank] = content["data"].get("text/plain", "")
            if set(content["data"]) != {"text/plain"}:
                self._queue(rank, content)
        elif kind in ("display_data", "update_display_data"):
            self._show(rank, kind, content)
        else:
            return
        self.num_changes += 1

    def _show(self, rank: int, kind: str, content: dict[str, Any]) -> None:
        display_id = content.get("transient", {}).get("display_id")
        waiting = self._displays[rank]
        if kind == "update_display_data":
            for i, (time_s, data, _) in enumerate(waiting):
                if data.get("_display_id") == display_id:
                    waiting[i] = (time_s, {**content["data"], "_display_id": display_id},
                                  content.get("metadata", {}))  # fmt: skip
                    return
        self._queue(rank, content, display_id)

    def _queue(self, rank: int, content: dict[str, Any], display_id: str | None = None) -> None:
        data = {**content["data"], "_display_id": display_id}
        self._displays[rank].append((time.monotonic(), data, content.get("metadata", {})))


def _merged(heads: dict[int, tuple[float, dict[str, Any], dict[str, Any]]]) -> list[Display]:
    groups: list[tuple[list[int], dict[str, Any], dict[str, Any]]] = []
    for rank, (_, data, metadata) in sorted(heads.items()):
        shown = {k: v for k, v in data.items() if k != "_display_id"}
        for ranks, other, _ in groups:
            if other == shown:
                ranks.append(rank)
                break
        else:
            groups.append(([rank], shown, metadata))
    return [Display(tuple(ranks), data, metadata) for ranks, data, metadata in groups]
