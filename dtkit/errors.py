"""Everything dtkit raises, in one tree.

DtkitError
├── InvalidInputError   the user asked for something that cannot be done; the text names the fix
├── ClosedError         the session was shut down (by the user: not a fault)
├── StartError          the cluster or the process group did not come up
├── CheckpointError     a checkpoint could not be written or loaded; the one before is as it was
├── EngineDiedError     an engine's process ended while it was needed (the world's fault)
├── ClusterDiedError    the controller's process ended, and with it the session (the same)
└── RankError           the user's code raised on one or more ranks
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ClosedError",
    "ClusterDiedError",
    "DtkitError",
    "EngineDiedError",
    "InvalidInputError",
    "RankError",
    "RankFailure",
    "StartError",
    "check_choice",
    "did_you_mean",
]


_NUMBER = re.compile(r"\d[\d.]*")
_CAUGHT = re.compile(
    r"Caught (?P<name>\w+) in (?P<place>[^\n]+)\.\n"
    r"Original Traceback.*\n[\w.]*(?P=name): (?P<text>.*)",
    re.DOTALL,
)
"""How torch tells what a DataLoader's worker raised (`torch._utils.ExceptionWrapper`)."""


class DtkitError(Exception):
    """Base of every error that dtkit raises; catch this one to catch all."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this instead of printing the driver's own frames, which
        # say nothing about what went wrong on the ranks.
        return [f"{type(self).__name__}: {self}"]


class InvalidInputError(DtkitError, ValueError):
    """The request cannot be carried out as given; the message names the fix."""


class ClosedError(DtkitError):
    """The session was shut down. Start a new one with %dist_init."""


class StartError(DtkitError):
    """The cluster or its process group did not come up; holds the engines' last log lines."""


class CheckpointError(DtkitError):
    """A checkpoint could not be written or loaded; those that were there are as they were."""


class EngineDiedError(DtkitError):
    """An engine's process ended while it was needed."""


class ClusterDiedError(DtkitError):
    """The cluster's controller ended: no engine can be reached any more. %dist_init starts anew."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What one rank reported when the cell failed there."""

    rank: int
    ename: str
    evalue: str
    traceback: str
    line: int | None = None
    is_echo: bool = False
    """True when the failure only repeats another rank's (a collective that was released)."""


class RankError(DtkitError):
    """The cell failed on one or more ranks.

    Attributes:
        failures: one `RankFailure` per failed rank; the causal ones come first.
        epilogue: what was done about it, e.g. which ranks were released.
    """

    def __init__(self, failures: tuple[RankFailure, ...], epilogue: str = "") -> None:
        self.failures = failures
        self.epilogue = epilogue
        super().__init__(failures, epilogue)

    @property
    def causes(self) -> tuple[RankFailure, ...]:
        """The failures that are not merely the echo of another rank's."""
        return tuple(f for f in self.failures if not f.is_echo) or self.failures

    def __str__(self) -> str:
        lines = []
        for ranks, failure in self._grouped():
            where = f" (cell line {failure.line})" if failure.line else ""
            lines.append(f"{_rank_list(ranks)}: {failure.ename}: {_in_short(failure)}{where}")
        if self.epilogue:
            lines.append(self.epilogue)
        return "\n".join(lines)

    def _grouped(self) -> list[tuple[list[int], RankFailure]]:
        """Causal failures, the same one on several ranks taken together."""
        groups: dict[tuple[str, str, int | None], tuple[list[int], RankFailure]] = {}
        for failure in self.causes:
            key = (failure.ename, failure.evalue, failure.line)
            groups.setdefault(key, ([], failure))[0].append(failure.rank)
        return list(groups.values())

    def _alike(self) -> list[list[RankFailure]]:
        """Causal failures, those that differ in numbers only taken together: a rank, a size."""
        groups: dict[tuple[str, str, int | None], list[RankFailure]] = {}
        for failure in self.causes:
            key = (failure.ename, _NUMBER.sub("#", failure.evalue), failure.line)
            groups.setdefault(key, []).append(failure)
        return list(groups.values())

    def _render_traceback_(self) -> list[str]:
        rendered = []
        for first, *others in self._alike():
            where = f", cell line {first.line}" if first.line else ""
            ranks = _rank_list([first.rank, *(f.rank for f in others)])
            rendered += [f"── {ranks}{where} ──", first.traceback.rstrip()]
            rendered += [f"(rank {f.rank}: {f.evalue})" for f in others if f.evalue != first.evalue]
        num_echoes = len(self.failures) - len(self.causes)
        if num_echoes:
            echoes = [f.rank for f in self.failures if f.is_echo]
            rendered.append(f"({_rank_list(echoes)} failed as a consequence)")
        if self.epilogue:
            rendered.append(self.epilogue)
        return rendered


def _in_short(failure: RankFailure) -> str:
    """Return an error's text; of one that torch brings from a worker, what is not its traceback."""
    caught = _CAUGHT.match(failure.evalue)
    if caught is None:
        return failure.evalue
    return f"{caught['text'].strip()}, in {caught['place']}"


def _rank_list(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, sorted(ranks)))}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean NAME?" with the known name that is closest; empty if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a flag's value that is none of the choices.

    Raises:
        InvalidInputError: it is none; the text lists them.
    """
    if value not in choices:
        msg = f"{flag} {value}: choose one of {', '.join(choices)}"
        raise InvalidInputError(msg)
