"""Recipe: the flags of a run that change how it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dtkit.compression import Compression
from dtkit.errors import InvalidInputError

__all__ = ["Recipe"]

_BATCH = ("rank", "global")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a cell is trained.

    Attributes:
        manual: leave the cell alone; it distributes itself.
        batch: what a written batch size means: `rank`, of each rank, or `global`,
            of all ranks together (then N ranks give the loss curve of one).
        batch_size: stands in place of the written batch size of DataLoaders that train;
            None: as written.
        compress: how gradients travel between ranks, as `Compression.parse` reads it.
    """

    manual: bool = False
    batch: str = "rank"
    batch_size: int | None = None
    compress: str = "none"

    def __post_init__(self) -> None:
        Compression.parse(self.compress)
        if self.batch_size is not None and self.batch_size < 1:
            msg = f"--batch-size {self.batch_size}: 1 or more"
            raise InvalidInputError(msg)
        if self.batch not in _BATCH:
            msg = f"--batch {self.batch}: choose one of {', '.join(_BATCH)}"
            raise InvalidInputError(msg)
        if self.manual and self.batch == "global":
            msg = (
                "--batch global divides the cell's DataLoaders, --manual leaves them alone: use one"
            )
            raise InvalidInputError(msg)
        if self.manual and self.compress != "none":
            msg = (
                f"--compress {self.compress} changes how gradients are averaged, --manual leaves "
                "that to the cell: leave --manual out; a cell's own DDP is found and compressed"
            )
            raise InvalidInputError(msg)

    def __str__(self) -> str:
        flags = []
        if self.manual:
            flags.append("--manual")
        if self.batch != "rank":
            flags.append(f"--batch {self.batch}")
        if self.batch_size is not None:
            flags.append(f"--batch-size {self.batch_size}")
        if self.compress != "none":
            flags.append(f"--compress {self.compress}")
        return " ".join(flags)

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what takes part in the run for it, as `RunOptions.parts` does."""
        if self.batch_size is None:
            return []
        return [("dtkit.engine.batch_size:make", {"batch_size": self.batch_size})]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave."""
        return cls(**values)
