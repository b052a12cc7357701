"""Memory of the ranks in one line, for a cell that ran out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtkit.cluster import Engines
    from dtkit.errors import RankError

__all__ = ["memory_line", "ran_out_of_memory"]

_GIB = 2**30
_TIMEOUT_S = 1.0


def ran_out_of_memory(error: RankError) -> bool:
    """Return whether a rank lacked memory, as the engine words it."""
    return any("out of memory on the " in failure.evalue for failure in error.failures)


def memory_line(engines: Engines) -> str:
    """Return what each rank uses now, after the failed cell's tensors were let go."""
    answers = engines.control("status", timeout_s=_TIMEOUT_S)
    parts = [
        f"rank {rank} {answer['used_bytes'] / _GIB:.1f}"
        for rank, answer in sorted(answers.items())
        if answer.get("used_bytes") is not None
    ]
    totals = {answer["total_bytes"] for answer in answers.values() if answer.get("total_bytes")}
    of = f" of {max(totals) / _GIB:.0f}" if len(totals) == 1 else ""
    return f"memory now: {', '.join(parts)}{of} GiB" if parts else ""
