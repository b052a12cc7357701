"""Sets of ranks as people write them: "0,2:4" means ranks 0, 2 and 3."""

from __future__ import annotations

from dtkit.errors import InvalidInputError

__all__ = ["format_ranks", "parse_ranks"]


def parse_ranks(text: str, world_size: int) -> tuple[int, ...]:
    """Return the ranks that `text` names, sorted and without repeats.

    Args:
        text: comma-separated ranks and half-open slices with Python's meaning
            (`0,2:4`, `::2`, `-1`), or `all`.
        world_size: number of ranks; every named rank must lie below it.

    Raises:
        InvalidInputError: a part is neither a rank nor a slice, or names no rank there is.
    """
    if text.strip() == "all":
        return tuple(range(world_size))
    ranks: set[int] = set()
    for part in text.split(","):
        ranks.update(_parse_part(part.strip(), text, world_size))
    return tuple(sorted(ranks))


def _parse_part(part: str, text: str, world_size: int) -> list[int]:
    everyone = range(world_size)
    try:
        if ":" in part:
            bounds = [int(b) if b.strip() else None for b in part.split(":")]
            found = list(everyone[slice(*bounds)])
        else:
            found = [everyone[int(part)]]
    except (ValueError, IndexError, TypeError):
        found = []
    if not found:
        msg = (
            f"ranks {text!r}: {part!r} names no rank of 0 to {world_size - 1}; "
            "write for example 0, 0,2 or 1:3"
        )
        raise InvalidInputError(msg)
    return found


def format_ranks(ranks: tuple[int, ...] | list[int], world_size: int | None = None) -> str:
    """Return "all ranks", "rank 2" or "ranks 0–2, 5", ready to show.

    Args:
        ranks: the ranks to name, in any order.
        world_size: when given and every rank is named, the answer is "all ranks".
    """
    members = sorted(set(ranks))
    if world_size is not None and world_size > 1 and len(members) == world_size:
        return "all ranks"
    if len(members) == 1:
        return f"rank {members[0]}"
    spans: list[list[int]] = []
    for rank in members:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in spans]
    return "ranks " + ", ".join(parts)
