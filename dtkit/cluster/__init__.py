"""Engines: starting, calling, signalling and ending them. The only part that knows ipyparallel."""

from dtkit.cluster.attached import AttachedCluster
from dtkit.cluster.engines import Engines
from dtkit.cluster.execution import Execution, Reply
from dtkit.cluster.holding import interrupt_held
from dtkit.cluster.host import HostCluster
from dtkit.cluster.local import LocalCluster
from dtkit.cluster.placement import Slot, choose_backend, place_local
from dtkit.cluster.remote.attached import AttachedRemoteCluster
from dtkit.cluster.remote.cluster import RemoteCluster
from dtkit.cluster.remote.placing import Wish

__all__ = [
    "AttachedCluster",
    "AttachedRemoteCluster",
    "Engines",
    "Execution",
    "HostCluster",
    "LocalCluster",
    "RemoteCluster",
    "Reply",
    "Slot",
    "Wish",
    "choose_backend",
    "interrupt_held",
    "place_local",
]
