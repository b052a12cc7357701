"""Engines: starting, calling, signalling and ending them. The only part that knows ipyparallel."""

from dtkit.cluster.engines import Engines, Execution, Reply
from dtkit.cluster.local import LocalCluster
from dtkit.cluster.placement import Slot, choose_backend, place_local

__all__ = ["Engines", "Execution", "LocalCluster", "Reply", "Slot", "choose_backend", "place_local"]
