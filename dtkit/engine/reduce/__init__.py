"""Averaging gradients over ranks: buckets and the synchronizer that fills and empties them."""

from dtkit.engine.reduce.synchronizer import GradSynchronizer

__all__ = ["GradSynchronizer"]
