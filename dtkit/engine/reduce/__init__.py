"""Averaging gradients over ranks: buckets, the synchronizer that fills them, and when it does."""

from dtkit.engine.reduce.buckets import Bucket
from dtkit.engine.reduce.passes import Passes
from dtkit.engine.reduce.synchronizer import GradSynchronizer
from dtkit.engine.reduce.wire import Wire

__all__ = ["Bucket", "GradSynchronizer", "Passes", "Wire"]
