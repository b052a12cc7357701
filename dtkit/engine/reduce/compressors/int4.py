"""Four bits a number, with a scale for each 256: an eighth of the bytes."""

from dtkit.engine.reduce.compressors._quantizing import Quantizing

__all__ = ["Method"]


class Method(Quantizing):
    """15 levels."""

    num_bits = 4
    chunk = 256
