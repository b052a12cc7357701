"""What `--strategy` may say: how the ranks come to train one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dtkit._spec import split_spec
from dtkit.errors import InvalidInputError

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One strategy.

    Attributes:
        argument: what the number after the colon is called; "": there is none.
        example: such a number.
        does: what it does, with the number as `{0:g}`.
        has_inf: whether it may also be `inf`.
        refuses: the fields of a recipe that it does not go with, and what they would do.
    """

    argument: str = ""
    example: str = ""
    does: str = "gradients averaged"
    has_inf: bool = False
    refuses: dict[str, str] = field(default_factory=dict)


_LOOSE = {
    "batch": "gives N ranks the loss curve of one, which needs them in step",
    "compress": "makes gradients small on their way, and none travel",
}
_FREE = {
    **_LOOSE,
    "accumulate": "makes a step of the last batches of an epoch, and ranks that get batches as "
    "they ask for them do not know which these are",
}
_SHARDED = {"compress": "makes gradients small that torch averages itself when a model is sharded"}
STRATEGIES: dict[str, _Kind] = {
    "ddp": _Kind(),
    "shard": _Kind(refuses=_SHARDED),
    "hybrid": _Kind("SHARDS", "2", refuses=_SHARDED),
    "local-sgd": _Kind(
        "H", "8", "weights averaged every {0:g} steps", refuses=_LOOSE,
    ),
    "diloco": _Kind(
        "H", "32", "an outer step (Nesterov) every {0:g} steps", refuses=_LOOSE,
    ),
    "async": _Kind(
        "STALENESS", "8", "each step added to the weights of a server",
        has_inf=True, refuses=_FREE,
    ),
    "gossip": _Kind(does="weights averaged with another rank's after each step", refuses=_FREE),
}  # fmt: skip
"""By name. Those that are not named in `_IN_STEP` are parts of a run: `dtkit.engine.loose`."""
_IN_STEP = ("ddp", "shard", "hybrid")


@dataclass(frozen=True, slots=True)
class Strategy:
    """How the ranks come to train one model.

    Attributes:
        name: one of `STRATEGIES`.
        value: its number, None if it takes none; `math.inf` where that is allowed.
    """

    name: str = "ddp"
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Return what `ddp` and the like say.

        Raises:
            InvalidInputError: it says nothing that there is.
        """
        names = {name: kind.argument for name, kind in STRATEGIES.items()}
        name, number = split_spec("--strategy", text, names)
        if number is None:
            return cls(name)
        return cls(name, _number(text, name, number, STRATEGIES[name]))

    @property
    def is_loose(self) -> bool:
        """Whether each rank makes steps of its own, from its own gradients."""
        return self.name not in _IN_STEP

    @property
    def is_free(self) -> bool:
        """Whether ranks make other numbers of steps, and go on when one of them dies."""
        return self.name in ("async", "gossip")

    @property
    def does(self) -> str:
        """What it does, in a few words."""
        return STRATEGIES[self.name].does.format(self.value)

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what takes part in the run for it, as `RunOptions.parts` does."""
        return [("dtkit.engine.loose:make", {"strategy": str(self)})] if self.is_loose else []

    @property
    def refuses(self) -> dict[str, str]:
        """The fields of a recipe that it does not go with, and what they would do."""
        return STRATEGIES[self.name].refuses

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value:g}"


def _number(text: str, name: str, number: str, kind: _Kind) -> float:
    if kind.has_inf and number == "inf":
        return math.inf
    if number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    choice = " or inf" if kind.has_inf else ""
    msg = (
        f"--strategy {text}: {kind.argument} must be a whole number greater than 0{choice}, "
        f"as in {name}:{kind.example}"
    )
    raise InvalidInputError(msg)
