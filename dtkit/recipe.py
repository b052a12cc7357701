"""Recipe: the flags of a run that change how it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from dtkit.compression import Compression
from dtkit.errors import InvalidInputError, check_choice
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from dtkit.options import RunOptions

__all__ = ["AMP", "Recipe"]

AMP = ("bf16", "fp16", "off")
_BATCH = ("rank", "global")
_WITHOUT_MANUAL = {
    "batch": "divides the cell's DataLoaders",
    "amp": "puts the cell's forward passes under autocast",
    "accumulate": "holds the cell's optimizer steps back",
    "compress": "changes how gradients are averaged",
    "strategy": "says how the ranks come to train one model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a cell is trained.

    Attributes:
        manual: leave the cell alone; it distributes itself.
        batch: what a written batch size means: `rank`, of each rank, or `global`,
            of all ranks together (then N ranks give the loss curve of one).
        batch_size: stands in place of the written batch size of DataLoaders that train;
            None: as written.
        amp: the precision of forward passes and losses: `bf16`, `fp16` or `off`.
        accumulate: how many written steps make one.
        compress: how gradients travel between ranks, as `Compression.parse` reads it.
        strategy: how the ranks come to train one model, as `Strategy.parse` reads it.
    """

    manual: bool = False
    batch: str = "rank"
    batch_size: int | None = None
    amp: str = "off"
    accumulate: int = 1
    compress: str = "none"
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        Compression.parse(self.compress)
        if self.batch_size is not None and self.batch_size < 1:
            msg = f"--batch-size {self.batch_size}: 1 or more"
            raise InvalidInputError(msg)
        check_choice("--batch", self.batch, _BATCH)
        check_choice("--amp", self.amp, AMP)
        if self.accumulate < 1:
            msg = f"--accumulate {self.accumulate}: how many steps make one, 1 or more"
            raise InvalidInputError(msg)
        strategy = Strategy.parse(self.strategy)
        self._refuse(strategy.refuses, f"not with --strategy {strategy}")
        if self.manual:
            self._refuse(
                _WITHOUT_MANUAL,
                "--manual leaves the cell alone: use one. A cell that distributes its model "
                "itself is recognized without --manual",
            )

    def _refuse(self, reasons: dict[str, str], why: str) -> None:
        """Raise if a field that has a reason against it is not as it is by default."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in reasons and value != field.default:
                flag = field.name.replace("_", "-")
                msg = f"--{flag} {value} {reasons[field.name]}, {why}"
                raise InvalidInputError(msg)

    def __str__(self) -> str:
        flags = ["--manual"] if self.manual else []
        flags += [
            f"--{field.name.replace('_', '-')} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name != "manual" and getattr(self, field.name) != field.default
        ]
        return " ".join(flags)

    @property
    def is_free(self) -> bool:
        """Whether ranks make steps without waiting for each other."""
        return Strategy.parse(self.strategy).is_free

    def check(self, options: RunOptions) -> None:
        """Refuse options that do not go with how it trains.

        Raises:
            InvalidInputError: there is one.
        """
        if self.is_free and options.checkpoint_every:
            msg = (
                "--checkpoint-every counts steps that all ranks make alike, and with --strategy "
                f"{self.strategy} each makes its own: call dtkit.checkpoint() at an epoch's end"
            )
            raise InvalidInputError(msg)

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what takes part in the run for it, as `RunOptions.parts` does."""
        parts = Strategy.parse(self.strategy).parts()
        if self.batch_size is not None:
            parts.append(("dtkit.engine.parts.batch_size:make", {"batch_size": self.batch_size}))
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave."""
        return cls(**values)
