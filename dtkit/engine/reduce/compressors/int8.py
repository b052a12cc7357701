"""Eight bits a number, with a scale for each 1024: a quarter of the bytes."""

from dtkit.engine.reduce.compressors._quantizing import Quantizing

__all__ = ["Method"]


class Method(Quantizing):
    """255 levels."""

    num_bits = 8
    chunk = 1024
