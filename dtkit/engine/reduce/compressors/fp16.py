"""Half precision: half the bytes.

A gradient beyond 65504 becomes infinite, as in torch's own hook, so that a
GradScaler sees it and lowers its scale; `bf16` has float32's range.
"""

from typing import ClassVar

import torch

from dtkit.engine.reduce.compressors._casting import Casting

__all__ = ["Method"]


class Method(Casting):
    """IEEE half precision: 11 bits of mantissa."""

    wire_dtype: ClassVar[torch.dtype] = torch.float16
