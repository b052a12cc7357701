"""SyncBatchNorm: batch statistics over the samples of all ranks, on CPU and GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dtkit.horovod.reduction import Op
from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.basics import is_initialized, size
from dtkit.horovod.torch.submit import submit_reduce

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, …) inputs by the mean and variance over all ranks.

    Ranks may have batches of different sizes. Arguments as of torch's BatchNorm.
    """

    def __init__(
        self, *args: Any, process_set: ProcessSet = global_process_set, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  torch's name
        if input.dim() < 2:  # noqa: PLR2004
            msg = f"SyncBatchNorm takes inputs of two or more dimensions, not {input.dim()}"
            raise ValueError(msg)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's name
        """Return the normalized input."""
        self._check_input_dim(input)
        is_batch = self.training or self.running_mean is None
        if not is_batch or not is_initialized() or size() == 1:
            return super().forward(input)
        momentum = self._count_batch()
        result, mean, variance, num = _normalize(
            input, self.weight, self.bias, self.eps, self._process_set
        )
        if self.training and self.running_mean is not None and self.running_var is not None:
            unbiased = variance * (num / (num - 1).clamp(min=1))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        output: torch.Tensor = result
        return output

    def _count_batch(self) -> float:
        """Count the batch; returns how much it weighs in the running statistics."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else float(self.momentum)


class _Normalize(torch.autograd.Function):
    """source: Ioffe and Szegedy, arXiv 1502.03167, with sums over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
        eps: float, process_set: ProcessSet,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Normalize; returns also mean, biased variance and number of samples."""
        others = [d for d in range(x.dim()) if d != 1]
        wide = x.double() if x.dtype is torch.float64 else x.float()
        own = torch.stack([
            wide.sum(others), (wide * wide).sum(others),
            torch.full((x.shape[1],), x.numel() / x.shape[1], dtype=wide.dtype, device=x.device),
        ])  # fmt: skip
        # In double: the variance is a small difference of large numbers.
        (sums,) = submit_reduce([own.double()], Op.SUM, None, process_set).wait()
        num = sums[2, 0]
        mean = sums[0] / num
        variance = (sums[1] / num - mean * mean).clamp(min=0)
        scale = (variance + eps).rsqrt()
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean_x, scale_x = mean.to(wide.dtype).view(shape), scale.to(wide.dtype).view(shape)
        normal = (wide - mean_x) * scale_x
        result = normal
        if weight is not None and bias is not None:
            result = normal * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(normal, scale_x, weight)
        ctx.call = (others, shape, num, process_set)
        outputs = (result.to(x.dtype), mean, variance, num)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Return the gradients of input, weight and bias; the last two are this rank's part."""
        normal, scale, weight = ctx.saved_tensors
        others, shape, num, process_set = ctx.call
        grad = grads[0].to(normal.dtype)
        grad_bias = grad.sum(others)
        grad_weight = (grad * normal).sum(others)
        (sums,) = submit_reduce(
            [torch.stack([grad_bias, grad_weight]).double()], Op.SUM, None, process_set
        ).wait()
        means = (sums / num).to(normal.dtype)
        factor = scale if weight is None else scale * weight.view(shape)
        grad_x = factor * (grad - means[0].view(shape) - normal * means[1].view(shape))
        is_affine = weight is not None
        return (
            grad_x.to(grads[0].dtype),
            grad_weight if is_affine else None,
            grad_bias if is_affine else None,
            None,
            None,
        )


_normalize: Callable[..., tuple[torch.Tensor, ...]] = _Normalize.apply
