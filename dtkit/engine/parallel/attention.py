"""`nn.MultiheadAttention` with some of its heads on each rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional

from dtkit.engine.parallel.regions import everywhere, whole
from dtkit.engine.parallel.styles import divide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DividedAttention", "divide_attention", "why_not_divided"]

# Any, below: parameters of the module that may be None.


class DividedAttention(nn.MultiheadAttention):
    """torch's attention, of which each rank computes its heads.

    Its class alone differs from `nn.MultiheadAttention`, and the parameters are divided.
    """

    def forward(  # noqa: PLR0917  torch's arguments
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,  # noqa: FBT001, FBT002  torch's
        attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Compute what `nn.MultiheadAttention` does."""
        if is_causal and attn_mask is None:
            msg = "Need attn_mask if specifying the is_causal hint."  # torch's own words
            raise RuntimeError(msg)
        attn_mask, key_padding_mask = whole(attn_mask), whole(key_padding_mask)
        is_batched = query.dim() == 3  # noqa: PLR2004  (batch, sequence, width)
        if not is_batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        heads = [self._heads(t) for t in self._project(query, key, value)]
        mask = self._mask(attn_mask, key_padding_mask, heads[0])
        output, found = self._attend(heads, mask, need_weights=need_weights)
        output = DTensor.from_local(
            output.transpose(1, 2).flatten(2).contiguous(), self._mesh, [Shard(2)], run_check=False
        )
        bias: Any = self.out_proj.bias
        projected = whole(functional.linear(output, self.out_proj.weight, bias))
        weights = None if found is None else self._weights(found, is_averaged=average_attn_weights)
        if not is_batched:
            return projected.squeeze(0), None if weights is None else weights.squeeze(0)
        return projected if self.batch_first else projected.transpose(0, 1), weights

    @property
    def _mesh(self) -> DeviceMesh:
        weight: Any = self.out_proj.weight
        return weight.device_mesh  # type: ignore[no-any-return]

    def _project(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values, (batch, sequence, width), divided in the last."""
        biases: Any = [None] * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.unflatten(0, (3, self.embed_dim)).unbind()
        matrices: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.unflatten(0, (3, self.embed_dim)).unbind()
        placed = {id(t): everywhere(self._mesh, t) for t in given}  # self-attention: once
        return [
            functional.linear(placed[id(t)], matrix, bias)
            for t, matrix, bias in zip(given, matrices, biases, strict=True)
        ]

    def _heads(self, tensor: Any) -> torch.Tensor:
        """Return the heads that are here: (batch, head, sequence, width of a head)."""
        return tensor.to_local().unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

    def _mask(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, query: torch.Tensor
    ) -> torch.Tensor | None:
        """Return what is added to the scores of the heads that are here."""
        found = None
        if attn_mask is not None:
            found = _additive(attn_mask, query.dtype)
            if found.dim() == 3:  # noqa: PLR2004  a mask for each head of each sample
                here = self._mesh.get_local_rank()
                found = found.view(-1, self.num_heads, *found.shape[1:])
                found = found.chunk(self._mesh.size(), 1)[here]
        if padding is not None:
            added = _additive(padding, query.dtype)[:, None, None, :]
            found = added if found is None else found + added
        return found

    def _attend(
        self, heads: list[torch.Tensor], mask: torch.Tensor | None, *, need_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = heads
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(query, key, value, mask, dropout), None
        scores = query * math.sqrt(1.0 / self.head_dim) @ key.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        return weights @ value, weights

    def _weights(self, found: torch.Tensor, *, is_averaged: bool) -> torch.Tensor:
        weights: Any = DTensor.from_local(found, self._mesh, [Shard(1)], run_check=False)
        return whole(weights.mean(1) if is_averaged else weights)  # type: ignore[no-any-return]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def divide_attention(module: nn.MultiheadAttention, mesh: DeviceMesh) -> None:
    """Give each rank of a mesh its heads."""
    three: Any = _StridedShard(0, split_factor=3)
    for name, param in list(module.named_parameters(recurse=False)):
        placement = three if name.startswith("in_proj") else Shard(0)
        module.register_parameter(name, divide(param, mesh, placement))
    output = module.out_proj
    for name, param in list(output.named_parameters(recurse=False)):
        placement = Shard(1) if name == "weight" else Replicate()
        output.register_parameter(name, divide(param, mesh, placement))
    module.__class__ = DividedAttention


def why_not_divided(module: nn.MultiheadAttention, num_ranks: int) -> str:
    """Return why the heads cannot be divided among so many ranks; empty: they can."""
    if module.num_heads % num_ranks:
        return f"{module.num_heads} heads on {num_ranks} ranks"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not divided"
    return ""
