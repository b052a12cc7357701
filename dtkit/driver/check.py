"""Check: whether the ranks have the same model, and each its own part of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit._ranks import format_ranks
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dtkit.cluster import Engines

__all__ = ["Check", "check"]

# Any, below: what ranks answer is JSON and arrays.

_REMEDY = {
    "parameter": "a run makes the weights of what it trains equal at its start; by hand: "
    "%dist_pull {0} --rank {1}, then %dist_push {0}",
    "buffer": "a run makes them equal at its start; by hand: %dist_pull {0} --rank {1}, then "
    "%dist_push {0}",
    "optimizer state": "ranks that go on with it part again: make {0} anew on all ranks, or load "
    "it from a checkpoint",
    "setting": "set it on all ranks: %%dist",
    "tensor": "%dist_pull {0} --rank {1}, then %dist_push {0}",
    "state": "load the same on all ranks: %%dist",
}


@dataclass(frozen=True, slots=True)
class Check:
    """What was compared over the ranks.

    Attributes:
        is_equal: whether everything that must be alike is, and samples are divided well.
        difference: the first difference and what to do about it; empty if there is none.
        lines: a line for each thing that was compared.
    """

    is_equal: bool
    difference: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*([self.difference] if self.difference else []), *self.lines])

    def __repr__(self) -> str:
        return str(self)


def check(engines: Engines, names: Sequence[str] = ()) -> Check:
    """Compare objects, random numbers and data over the ranks.

    Args:
        engines: where the ranks live; idle.
        names: what to compare; none: all models, optimizers and divided loaders there are.

    Raises:
        InvalidInputError: no rank has such a name.
        RankError: a name is nothing that can be compared.
    """
    answers = engines.call("dtkit.engine.check:collect", (tuple(names),))
    found = _Answers(engines, answers, tuple(names))
    for name in names:
        if all(name in answer["missing"] for answer in answers.values()):
            msg = f"no rank has a {name}; see what there is with %dist dir()"
            raise InvalidInputError(msg)
    differences = [text for text in (found.first_difference(), found.data_difference()) if text]
    lines = (*found.parts_lines(), *found.data_lines(), found.random_line())
    return Check(not differences, "\n".join(differences), lines)


class _Answers:
    """What all ranks have said, compared."""

    def __init__(
        self, engines: Engines, answers: dict[int, dict[str, Any]], names: tuple[str, ...]
    ) -> None:
        self._engines = engines
        self._names = names
        self._ranks = tuple(sorted(answers))
        self._answers = answers
        self._parts = {rank: answer["parts"] for rank, answer in answers.items()}
        # The order of the first rank; what only others have comes last.
        self._paths = list(dict.fromkeys(p for rank in self._ranks for p in self._parts[rank]))

    def parts_lines(self) -> list[str]:
        """Return how many things of each object were compared."""
        counts: dict[str, Counter[str]] = {}
        unlike: Counter[str] = Counter()
        for path in self._paths:
            name = self._object(path)
            counts.setdefault(name, Counter())[self._kind(path)] += 1
            unlike[name] += not self._is_alike(path)
        lines = []
        for name, kinds in counts.items():
            what = ", ".join(_count(num, kind) for kind, num in kinds.items())
            verdict = f"{unlike[name]} differ" if unlike[name] else "equal on all ranks"
            lines.append(f"{name}: {what}: {verdict}")
        return lines or ["no model and no optimizer has a name on the ranks"]

    def first_difference(self) -> str:
        """Return the first thing that differs, where, by how much, and what to do."""
        path = next((p for p in self._paths if not self._is_alike(p)), None)
        if path is None:
            return ""
        has_it = [rank for rank in self._ranks if path in self._parts[rank]]
        if len(has_it) < len(self._ranks):
            missing = format_ranks([r for r in self._ranks if r not in has_it])
            there = format_ranks(has_it)
            return f"{path} is on {there} and not on {missing}: run its cell on all ranks"
        others, odd = self._sides({rank: self._parts[rank][path][1] for rank in self._ranks})
        about = {rank: self._parts[rank][path][2] for rank in (others[0], odd[0])}
        if about[others[0]] != about[odd[0]]:
            how = f"{about[odd[0]]} against {about[others[0]]}"
        else:
            how = self._by_how_much(path, others[0], odd[0])
        remedy = _REMEDY[self._kind(path)].format(self._object(path), others[0])
        return (
            f"{path} differs: {format_ranks(odd)} from {format_ranks(others)}; {how}. "
            f"What to do: {remedy}"
        )

    def data_lines(self) -> list[str]:
        """Return what became of each loader's samples."""
        return [
            f"{name}: {_drawn_text(counts)}"
            for name, counts in self._drawn().items()
            if not self._data_fault(name, counts)
        ]

    def data_difference(self) -> str:
        """Return the first fault in how samples are divided."""
        faults = (self._data_fault(name, counts) for name, counts in self._drawn().items())
        return next(filter(None, faults), "")

    def random_line(self) -> str:
        """Return which generators are alike; either may be meant."""
        states = {rank: answer["random"] for rank, answer in self._answers.items()}
        kinds = list(states[self._ranks[0]])
        alike = [k for k in kinds if len({s.get(k) for s in states.values()}) == 1]
        apart = [k for k in kinds if k not in alike]
        parts = [f"{', '.join(alike)} equal on all ranks"] if alike else []
        if apart:
            parts.append(f"{', '.join(apart)} of each rank's own, as dropout and augmentation want")
        return f"random numbers: {'; '.join(parts)}"

    def _object(self, path: str) -> str:
        """Return the name that a path begins with."""
        given = [n for n in self._names if path == n or path.startswith((f"{n}.", f"{n}["))]
        return max(given, key=len) if given else path.partition(".")[0].partition("[")[0]

    def _kind(self, path: str) -> str:
        kind: str = next(parts[path][0] for parts in self._parts.values() if path in parts)
        return kind

    def _is_alike(self, path: str) -> bool:
        digests = {parts[path][1] if path in parts else None for parts in self._parts.values()}
        return len(digests) == 1

    def _sides(self, values: Mapping[int, Any]) -> tuple[list[int], list[int]]:
        """Return the ranks that most agree with, and those that the first other one does."""
        groups: dict[Any, list[int]] = {}
        for rank, value in values.items():
            groups.setdefault(value, []).append(rank)
        sides = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))
        return sides[0], [r for ranks in sides[1:] for r in ranks]

    def _by_how_much(self, path: str, one: int, other: int) -> str:
        call = "dtkit.engine.check:block"
        digests = self._engines.call(call, (path, self._names, None), ranks=(one, other))
        if digests[one] is None:  # no tensor
            told = {rank: self._parts[rank][path][2] for rank in (one, other)}
            return f"{told[other]} against {told[one]}"
        pairs = zip(digests[one], digests[other], strict=True)
        number = next(i for i, (a, b) in enumerate(pairs) if a != b)
        values = self._engines.call(call, (path, self._names, number), ranks=(one, other))
        distance = np.abs(values[one] - values[other])
        # NaN beside a number differs, too; NaN beside NaN does not.
        is_other = ~((values[one] == values[other]) | np.isnan(values[one] + values[other]))
        is_other |= np.isnan(values[one]) != np.isnan(values[other])
        if not is_other.any():
            return "in the bits of NaN or of zero only"
        first = int(np.argmax(is_other))
        most = np.nanmax(np.where(is_other, distance, 0.0))
        return (
            f"max |difference| {most:.1e}, {int(is_other.sum()):,} of {len(distance):,} elements, "
            f"first element {first + number * (1 << 20):,}: {values[other][first]:.6g} against "
            f"{values[one][first]:.6g}"
        )

    def _drawn(self) -> dict[str, tuple[np.ndarray[Any, Any], bool]]:
        """Return by loader how often each rank drew each sample, and whether passes ended."""
        found = {}
        for name in self._answers[self._ranks[0]]["data"]:
            told = [self._answers[r]["data"].get(name) for r in self._ranks]
            if all(told) and len({len(t["counts"]) for t in told}) == 1:
                counts = np.stack([np.frombuffer(t["counts"], np.uint8) for t in told])
                found[name] = counts, all(t["is_whole"] for t in told)
        return found

    def _data_fault(self, name: str, drawn: tuple[np.ndarray[Any, Any], bool]) -> str:
        counts, is_whole = drawn
        shared = (counts > 0).sum(0) > 1
        if shared.sum() >= len(self._ranks):  # a sampler that pads repeats fewer
            pairs = np.argwhere(counts[:, shared.argmax()] > 0).ravel()
            ranks = [self._ranks[int(i)] for i in pairs]
            return (
                f"{name}: {int(shared.sum()):,} of {counts.shape[1]:,} samples are drawn by "
                f"several ranks, the first, sample {int(shared.argmax())}, by "
                f"{format_ranks(ranks)}. What to do: give a DistributedSampler rank=rank, or leave "
                "the loader to dtkit (shuffle=True and no sampler)"
            )
        num_missing = int((counts.sum(0) == 0).sum())
        if is_whole and num_missing > int(counts.sum()) // 2:
            return (
                f"{name}: {num_missing:,} of {counts.shape[1]:,} samples are drawn by no rank. "
                "What to do: see what its sampler leaves out"
            )
        return ""


def _drawn_text(drawn: tuple[np.ndarray[Any, Any], bool]) -> str:
    counts, is_whole = drawn
    num = int((counts.sum(0) > 0).sum())
    twice = int((counts.sum(0) > 1).sum())
    sizes = " + ".join(f"{int(n):,}" for n in (counts > 0).sum(1))
    if num == counts.shape[1]:
        what = f"{sizes} samples, disjoint, all {num:,} of them"
    else:
        why = "drop_last, or the sampler" if is_whole else "the pass was not ended"
        what = f"{sizes} samples, disjoint, {num:,} of {counts.shape[1]:,} ({why})"
    return what.replace("disjoint", f"{twice} twice (padding)") if twice else what


def _count(num: int, kind: str) -> str:
    return f"{num} {kind}{'' if num == 1 or kind.endswith('state') else 's'}"
