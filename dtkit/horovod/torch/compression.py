"""Compression of what travels, in Horovod's interface."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TC002  Horovod users subclass what stands here

from dtkit.compression import Compression as Method
from dtkit.engine.reduce.compressors import bf16, fp16

__all__ = ["Compression", "Compressor", "Remembering"]


class Compressor:
    """Makes a tensor smaller for its way, and large again; subclass it for one of your own."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the tensor that travels, and what `decompress` needs."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return the tensor that arrived, as it was before."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Leaves tensors as they are."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the tensor."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:  # noqa: ARG004  Horovod's name
        """Return the tensor."""
        return tensor


class _CastCompressor(Compressor):
    dtype: torch.dtype

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the tensor in fewer bits, if it is of a wider floating-point type."""
        if tensor.is_floating_point() and tensor.element_size() > cls.dtype.itemsize:
            return tensor.to(cls.dtype), tensor.dtype
        return tensor, None

    @classmethod
    def decompress(cls, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return the tensor in its own type."""
        return tensor if ctx is None else tensor.to(ctx)


class FP16Compressor(_CastCompressor):
    """Sends floating-point tensors as float16."""

    dtype: torch.dtype = fp16.Method.wire_dtype


class BF16Compressor(_CastCompressor):
    """Sends floating-point tensors as bfloat16: float32's range, fewer digits."""

    dtype: torch.dtype = bf16.Method.wire_dtype


class Remembering(Compressor):
    """One of dtkit's methods, which remember from step to step what they left out.

    Only a `DistributedOptimizer` has steps, so only there can it be used.

    Attributes:
        method: as `--compress` names it.
    """

    def __init__(self, method: str) -> None:
        self.method: Method = Method.parse(method)

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Refuse: a single tensor has no earlier one to remember."""
        msg = (
            "this compression remembers from step to step what it left out: give it to "
            "hvd.DistributedOptimizer(compression=…); hvd.Compression.fp16 and bf16 work anywhere"
        )
        raise NotImplementedError(msg)


class Compression:
    """The compressors there are: Horovod's, and dtkit's."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
    int8: Remembering = Remembering("int8")
    int4: Remembering = Remembering("int4")
    sign: Remembering = Remembering("sign")

    @staticmethod
    def topk(ratio: float) -> Remembering:
        """Return the method that sends the largest `ratio` of the numbers."""
        return Remembering(f"topk:{ratio}")

    @staticmethod
    def powersgd(rank: int) -> Remembering:
        """Return the method that sends matrices of this rank in place of larger ones."""
        return Remembering(f"powersgd:{rank}")
