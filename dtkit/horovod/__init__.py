"""Horovod's interface on torch.distributed; `dtkit.horovod.torch` is the part that trains."""

from __future__ import annotations

__all__: list[str] = []
