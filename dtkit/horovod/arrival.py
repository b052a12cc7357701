"""Who has come to `hvd.init` in a notebook's session: a rank that never comes is named."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistStoreError

from dtkit.horovod.errors import HorovodInternalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

    from dtkit.horovod.patience import Patience

__all__ = ["arriving", "leave"]

_TICK = timedelta(seconds=1)
"""So often the wait looks up, for a Stop or its own end."""


@contextmanager
def arriving(store: Store, rank: int, size: int, patience: Patience) -> Iterator[None]:
    """Wait until all ranks have come; who leaves the context by an error has not come.

    Raises:
        HorovodInternalError: some have not come within `patience.shutdown_s`.
    """
    store.set(_key(rank), "here")
    try:
        _wait(store, size, patience)
        yield
    except BaseException:
        leave(store, rank)
        raise


def leave(store: Store, rank: int) -> None:
    """Take this rank's sign away."""
    store.delete_key(_key(rank))


def _wait(store: Store, size: int, patience: Patience) -> None:
    begun_s = said_s = time.monotonic()
    missing = [rank for rank in range(size) if not store.check([_key(rank)])]
    while missing:
        try:
            store.wait([_key(missing[0])], _TICK)
        except DistStoreError:
            now_s = time.monotonic()
            late = f"hvd.init(): no sign of {_names(missing)} for {now_s - begun_s:.0f} s"
            if 0 < patience.shutdown_s <= now_s - begun_s:
                raise HorovodInternalError(late) from None
            if 0 < patience.warning_s <= now_s - said_s:
                said_s = now_s
                sys.stderr.write(f"{late}; every rank must call it\n")
        missing = [rank for rank in missing if not store.check([_key(rank)])]


def _key(rank: int) -> str:
    return f"hvd.init/{rank}"


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
