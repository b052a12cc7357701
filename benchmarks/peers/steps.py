"""The step of one training under every peer, a block of each in turn."""

from __future__ import annotations

import contextlib
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.processes import BenchmarkError
from benchmarks.turns import Baton, Timed, alternate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.peers.room import Room

__all__ = ["steps"]

_NUM_WARM_BLOCKS = 2
_END_TIMEOUT_S = 60.0


def steps(rooms: Sequence[Room], num_rounds: int) -> dict[str, list[float] | str]:
    """Return the median step of each counted block by peer, in seconds; or why there is none."""
    found: dict[str, list[float] | str] = {}
    num_blocks = num_rounds + _NUM_WARM_BLOCKS
    with contextlib.ExitStack() as batons:
        begun: list[tuple[Room, Baton, Path]] = []
        for room in rooms:
            try:
                begun.append(_begin(room, num_blocks))
                batons.callback(begun[-1][1].close)
            except BenchmarkError as error:
                found[room.peer.name] = str(error)
                room.leave()
        alternate([(room.ready(), baton) for room, baton, _ in begun], num_blocks)
        for room, _, out in begun:
            room.ready().wait(_END_TIMEOUT_S)
            blocks = Timed.read(out, num_warm_blocks=_NUM_WARM_BLOCKS).blocks_s
            found[room.peer.name] = [median(block) for block in blocks]
    return found


def _begin(room: Room, num_blocks: int) -> tuple[Room, Baton, Path]:
    """Begin a training; on return it waits for its first turn."""
    opened, out = room.ready(), room.out()
    baton = Baton(out.parent / "turns")
    opened.begin(room.texts.training(out, baton.paths, num_blocks))
    baton.wait(opened)
    baton.put_back()
    return room, baton, out
