"""A few sentences about a timeline, each from a number that is shown; none if all is well."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtkit.trace.analysis import Analysis, Straggler

__all__ = ["LEAST_SHARE", "advise"]

LEAST_SHARE = 0.1
"""Of the step: what costs less is not worth a sentence."""
_MAX_SENTENCES = 3
_MIB = 2**20
_LATE = {
    "data": "whose DataLoader takes {ms:.1f} ms longer per step than the others': more workers or "
    "a faster disk there",
    "compute": "which computes {ms:.1f} ms longer per step than the others: a slower device, one "
    "that is shared, or more work (longer samples)",
    "idle": "which spends {ms:.1f} ms longer per step than the others between its phases: "
    "printing, saving or evaluating there",
}
_DATA = (
    "Every rank waits {share:.0%} of the step for its own DataLoader: more num_workers, or less "
    "work per sample."
)
_BY_CHANCE = (
    "{share:.0%} of the step the ranks wait for each other, now for one and now for another: their "
    "steps vary in length (samples of different sizes, other programs on the same cores)."
)
_IDLE = (
    "{share:.0%} of the step is neither data, computing nor communication: what the cell does "
    "between steps (printing, plotting, evaluating, starting a DataLoader's workers)."
)


def advise(found: Analysis, names: Mapping[int, str] | None = None) -> tuple[str, ...]:
    """Return what is worth changing, what costs most first.

    Args:
        found: the numbers.
        names: what ranks are called, as `names_of` says it; None: by their numbers.
    """
    late = next((s for s in found.stragglers if s.cause), None)
    is_late = late is not None and late.share >= LEAST_SHARE
    data = _common_data_share(found, late if is_late else None)
    transfer, idle = found.share("transfer"), found.share("idle")
    sentences: list[tuple[float, str]] = []
    if late is not None and is_late:
        sentences.append((late.share, _about_straggler(found, late, names or {})))
    else:
        waited = found.share("waited")
        if waited >= LEAST_SHARE:
            sentences.append((waited, _BY_CHANCE.format(share=waited)))
    if data >= LEAST_SHARE:
        sentences.append((data, _DATA.format(share=data)))
    if transfer >= LEAST_SHARE:
        sentences.append((transfer, _about_transfer(found, transfer)))
    if idle >= LEAST_SHARE:
        sentences.append((idle, _IDLE.format(share=idle)))
    return tuple(text for _, text in sorted(sentences, reverse=True)[:_MAX_SENTENCES])


def _common_data_share(found: Analysis, late: Straggler | None) -> float:
    """Return the share of data that all ranks have: a single rank's is said of that rank."""
    shares = [r.data_ms / r.step_ms for r in found.ranks if r.step_ms]
    return min(shares) if late is not None and late.cause == "data" else sum(shares) / len(shares)


def _about_straggler(found: Analysis, late: Straggler, names: Mapping[int, str]) -> str:
    who = "The other rank waits" if len(found.ranks) == 2 else "The other ranks wait"  # noqa: PLR2004
    why = _LATE[late.cause].format(ms=late.excess_ms)
    name = names.get(late.rank, f"rank {late.rank}")
    return f"{who} {late.share:.0%} of the step ({late.waited_ms:.1f} ms) for {name}, {why}."


def _about_transfer(found: Analysis, share: float) -> str:
    rate = f" at {found.bandwidth / _MIB:,.0f} MiB/s" if found.bandwidth else ""
    return (
        f"{share:.0%} of the step is spent exchanging {found.sent_bytes / _MIB:.1f} MiB{rate}, "
        "with every rank waiting: compress the gradients, accumulate several batches per step, or "
        "take larger batches."
    )
