"""Elastic training: ranks that are lost cost the batches since the last commit, not the job."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from dtkit.horovod import world
from dtkit.horovod.errors import HorovodInternalError, HostsUpdatedInterrupt
from dtkit.horovod.torch.basics import init, shutdown
from dtkit.horovod.torch.elastic.sampler import ElasticSampler
from dtkit.horovod.torch.elastic.state import ObjectState, State, TorchState

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Let `func(state, …)` go on from the last commit when ranks are lost.

    For that the script is started by `horovodrun --min-np N`; otherwise a lost
    rank raises HorovodInternalError as anywhere.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        init()
        is_synced = False
        while True:
            try:
                if not is_synced:
                    state.sync()
                return func(state, *args, **kwargs)
            except HorovodInternalError:
                if not world.is_elastic():
                    raise
                state.restore()
                is_synced = False
            except HostsUpdatedInterrupt as interrupt:
                if not world.is_elastic():
                    raise
                is_synced = interrupt.skip_sync
            _meet_again()
            state.on_reset()

    return wrapper


def _meet_again() -> None:
    """Join the ranks that are left; more may be lost while they meet."""
    while True:
        shutdown()
        world.ask_for_next()
        try:
            init()
        except HorovodInternalError:
            continue
        return
