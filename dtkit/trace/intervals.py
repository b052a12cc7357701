"""Sets of time as sorted, disjoint intervals [(start, end), …] of nanoseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Intervals", "clip", "intersect", "subtract", "total", "union"]

Intervals = list[tuple[int, int]]


def union(parts: Iterable[tuple[int, int]]) -> Intervals:
    """Return the intervals joined where they touch; empty ones are dropped."""
    joined: Intervals = []
    for start, end in sorted(parts):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            if end > joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def intersect(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> Intervals:
    """Return what is in both."""
    common: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> Intervals:
    """Return what is in `a` and not in `b`."""
    left: Intervals = []
    for start, end in a:
        at = start
        for cut_start, cut_end in b:
            if cut_end <= at or cut_start >= end:
                continue
            if cut_start > at:
                left.append((at, cut_start))
            at = max(at, cut_end)
        if at < end:
            left.append((at, end))
    return left


def clip(parts: Sequence[tuple[int, int]], start: int, end: int) -> Intervals:
    """Return what lies within [start, end]."""
    return intersect(parts, [(start, end)]) if start < end else []


def total(parts: Iterable[tuple[int, int]]) -> int:
    """Return the length of all."""
    return sum(end - start for start, end in parts)
