"""Batches dealt to the ranks one by one, as they ask for them: a fast rank trains on more."""

from __future__ import annotations

import random
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dtkit.engine import randomness
from dtkit.engine.loader import Share, Shares

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable, Iterator

    import torch.distributed as dist

__all__ = ["Dealt"]

_CHUNK = 256
"""Batches of the order that are drawn at once; a sampler may be endless."""

# Any, below: what a sampler yields.


class Dealt(Shares):
    """A batch sampler: whole written batches, each on the rank that asked for it first.

    Every rank draws the whole order, with random numbers that are the same on all, so
    nobody has to send it. The first batches of a pass are the ranks' own, one each: a
    cell may use its last batch after the loop.

    Args:
        written: the written batches.
        group: the ranks.
        draw: given the name of a pass and the last batch that this rank got, returns the
            number of the next that nobody has got.
        number: of this loader among those of the run; the same on all ranks.
        seed: the same on all ranks.
    """

    def __init__(
        self,
        written: Iterable[Iterable[Any]],
        group: dist.ProcessGroup,
        draw: Callable[[str, int], int],
        *,
        number: int,
        seed: int,
    ) -> None:
        super().__init__(written, group, is_global=False, drop_last=False)
        self._ask = draw
        self._number, self._seed = number, seed
        self._num_passes = 0

    def _draw(self, shares: deque[Share]) -> Iterator[list[Any]]:
        _, then = self._take_skipped()
        then()  # a pass that an earlier run had begun is begun anew
        self._begun()
        self._num_passes += 1
        name = f"{self._number}.{self._num_passes}"
        wanted, first = self._rank, []
        for number, batch in enumerate(self._order(name)):
            if number < self._world_size:
                first.append(batch)
            if number == wanted:
                yield self._share(batch, shares)
                wanted = self._ask(name, wanted)
        if first and len(first) <= self._rank:  # fewer batches than ranks
            yield self._share(first[self._rank % len(first)], shares)
        self._ended()

    def _share(self, batch: list[Any], shares: deque[Share]) -> list[Any]:
        return self._give(Share(batch, len(batch), 1.0, len(batch)), shares)

    def _order(self, name: str) -> Iterator[list[Any]]:
        """Yield the written batches of a pass, the same on all ranks."""
        inside = written = None
        while True:
            outside = randomness.snapshot()
            if inside is None or written is None:
                _seed_all(hash((self._seed, *map(int, name.split(".")))) % 2**32)
                written = map(list, self._written)  # some draw all of their order here
            else:
                randomness.restore(inside)
            batches = list(islice(written, _CHUNK))
            inside = randomness.snapshot()
            randomness.restore(outside)
            yield from batches
            if len(batches) < _CHUNK:
                return


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the one that samplers use
    random.seed(seed)
