"""Objects between the driver and the ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtkit.errors import InvalidInputError, RankError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.cluster import Engines

__all__ = ["Transfer", "pull", "push"]

# Any, below: the user's own objects.


@dataclass(frozen=True, slots=True)
class Transfer:
    """An object that was carried, with its size on the wire and the time it took."""

    name: str
    value: Any
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {_size(self.num_bytes)} in {self.seconds:.2f} s"


def pull(engines: Engines, name: str, rank: int) -> Transfer:
    """Bring an object from a rank; tensors and modules arrive on the CPU.

    Raises:
        InvalidInputError: there is no such name on the rank, or it cannot be carried.
    """
    begun_s = time.monotonic()
    try:
        payload = engines.call("dtkit.engine.transfer:export", (name,), ranks=[rank])[rank]
    except RankError as error:
        raise InvalidInputError(error.failures[0].evalue) from None
    import cloudpickle  # loads torch, when the object has tensors

    value = cloudpickle.loads(payload)
    return Transfer(name, value, len(payload), time.monotonic() - begun_s)


def push(engines: Engines, name: str, value: Any, ranks: Sequence[int] | None) -> Transfer:
    """Put an object into the namespace of ranks; tensors stay on the device they are on.

    Raises:
        InvalidInputError: it cannot be pickled.
    """
    import cloudpickle

    begun_s = time.monotonic()
    try:
        payload = cloudpickle.dumps(value)
    except Exception as error:
        msg = f"{name} cannot be sent: {type(error).__name__}: {error}"
        raise InvalidInputError(msg) from error
    engines.call("dtkit.engine.transfer:accept", (name, payload), ranks=ranks)
    return Transfer(name, value, len(payload), time.monotonic() - begun_s)


def _size(num_bytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:  # noqa: PLR2004
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
        num_bytes /= 1024  # type: ignore[assignment]
    return f"{num_bytes:.2f} GiB"
