"""Horovod's exceptions, by their own names."""

from __future__ import annotations

__all__ = ["HorovodInternalError", "HostsUpdatedInterrupt"]


class HorovodInternalError(RuntimeError):
    """A collective failed: ranks disagreed about it, or one of them is gone."""


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818  Horovod's name
    """Hosts were added or removed; training is to go on from the last commit.

    Args:
        skip_sync: whether the state need not be synchronised, as only ranks were lost.
    """

    def __init__(self, skip_sync: bool = False) -> None:  # noqa: FBT001, FBT002  Horovod's
        super().__init__("the set of hosts has changed")
        self.skip_sync = skip_sync
