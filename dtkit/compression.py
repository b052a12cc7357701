"""What `--compress` may say. The methods themselves are in `dtkit.engine.reduce.compressors`."""

from __future__ import annotations

from dataclasses import dataclass

from dtkit._spec import split_spec
from dtkit.errors import InvalidInputError

__all__ = ["GATHERED", "METHODS", "WITH_MOMENTUM", "Compression"]


@dataclass(frozen=True, slots=True)
class _Argument:
    """The number after the colon."""

    name: str
    example: str
    is_whole: bool
    at_most: float | None = None


METHODS: dict[str, _Argument | None] = {
    "none": None,
    "fp16": None,
    "bf16": None,
    "int8": None,
    "int4": None,
    "sign": None,
    "topk": _Argument("RATIO", "0.01", is_whole=False, at_most=1.0),
    "powersgd": _Argument("RANK", "4", is_whole=True),
}
"""By name, with the number that it takes. Each but `none` is a module of that name in
`dtkit/engine/reduce/compressors`: a new method is a line here and a file there."""
GATHERED = ("int8", "int4", "sign", "topk")
"""Methods whose codes cannot be added up on their way: each rank sends its own to every other, so
that with W ranks they save 2/W of what they save with two."""

WITH_MOMENTUM = ("topk", "sign")
"""Methods that apply SGD's momentum themselves, before they compress."""


@dataclass(frozen=True, slots=True)
class Compression:
    """How gradients are made small on their way between ranks.

    Attributes:
        name: one of `METHODS`.
        value: the method's number: the part that `topk` sends, the rank of `powersgd`.
    """

    name: str = "none"
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Return what `fp16`, `topk:0.01` and the like say.

        Raises:
            InvalidInputError: it says nothing that there is.
        """
        names = {name: argument.name if argument else "" for name, argument in METHODS.items()}
        name, number = split_spec("--compress", text, names)
        argument = METHODS[name]
        if argument is None or number is None:
            return cls(name)
        return cls(name, _number(text, name, number, argument))

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value:g}"


def _number(text: str, name: str, number: str, argument: _Argument) -> float:
    try:
        value = float(int(number) if argument.is_whole else number)
    except ValueError:
        value = -1.0
    limit = argument.at_most
    if not 0 < value < float("inf") or (limit is not None and value > limit):
        kind = "a whole number" if argument.is_whole else "a number"
        bound = "" if limit is None else f" and at most {limit:g}"
        msg = (
            f"--compress {text}: {argument.name} must be {kind} greater than 0{bound}, "
            f"as in {name}:{argument.example}"
        )
        raise InvalidInputError(msg)
    return value
