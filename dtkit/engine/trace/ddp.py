"""The collectives of DistributedDataParallel, which it calls in C++: seen through a hook of ours.

The communication hook does what DDP does without one, in Python, where it is seen:
one call per bucket.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from dtkit.engine.models import live_replicas
from dtkit.engine.patches import replaced
from dtkit.engine.reduce.ddp import DdpHook
from dtkit.engine.trace.collectives import Launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from dtkit.engine.trace.collectives import Collectives

__all__ = ["SeenReplicas"]

# Any, below: torch's buckets and futures, and arguments that are passed on as they are.


class SeenReplicas:
    """Sees the buckets of every DDP model of this process, as long as it is watching.

    Args:
        collectives: records what the hook calls.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._unseen: list[Any] = []
        self._hooks: list[DdpHook] = []
        self._launches: dict[tuple[int, ...], Launch] = {}
        self._ready_ns = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the context."""
        self._unseen = live_replicas()
        try:
            with replaced(DistributedDataParallel, "__init__", self._making):
                yield
        finally:
            for hook in self._hooks:
                hook.launching = None

    def before_backward(self) -> None:
        """See the models that were made since; a cell has had its time to set its own hook."""
        while self._unseen:
            hook = DdpHook.of(self._unseen.pop())
            if hook is not None:
                hook.launching = self._launching
                self._hooks.append(hook)
        self._ready_ns = 0

    def waited_ns(self) -> int:
        """Return how long the rank has waited since its last bucket was ready, 0 without DDP."""
        return time.perf_counter_ns() - self._ready_ns if self._ready_ns else 0

    @contextmanager
    def _launching(self, params: list[torch.Tensor]) -> Iterator[None]:
        key = tuple(map(id, params))
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = Launch(params)
        with self._collectives.launching(launch):
            yield
        self._ready_ns = launch.ready_ns

    def _making(self, original: Callable[..., None]) -> Callable[..., None]:
        def __init__(model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(model, *args, **kwargs)
            self._unseen.append(model)

        return __init__
