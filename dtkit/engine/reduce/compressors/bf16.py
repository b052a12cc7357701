"""bfloat16: half the bytes, the range of float32, 8 bits of mantissa."""

from typing import ClassVar

import torch

from dtkit.engine.reduce.compressors._casting import Casting

__all__ = ["Method"]


class Method(Casting):
    """Brain floating point."""

    wire_dtype: ClassVar[torch.dtype] = torch.bfloat16
