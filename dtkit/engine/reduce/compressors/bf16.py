"""bfloat16: half the bytes, the range of float32, 8 bits of mantissa."""

import torch

from dtkit.engine.reduce.compressors._casting import Casting

__all__ = ["Method"]


class Method(Casting):
    """Brain floating point."""

    wire_dtype = torch.bfloat16
