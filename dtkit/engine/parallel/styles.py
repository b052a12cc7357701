"""How a layer is divided, also one that is several in one, such as q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional

from dtkit.engine.parallel.regions import everywhere, is_inside, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Colwise",
    "FusedLinear",
    "Rowwise",
    "contiguous",
    "divide",
    "fuse",
    "is_fused",
    "separated",
    "stripes",
]


class Colwise(ColwiseParallel):
    """Give each rank some of a layer's outputs."""

    def __init__(self) -> None:
        super().__init__(use_local_output=False)

    @staticmethod
    def _prepare_output_fn(
        _layouts: Any, _use_local: Any, _module: nn.Module, outputs: Any, _mesh: DeviceMesh
    ) -> Any:
        # As it comes, divided as the weight is; whole for whoever calls the layer by itself.
        return outputs if is_inside() else whole(outputs)


class Rowwise(RowwiseParallel):
    """Give each rank some of a layer's inputs; it takes them whole or divided."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate())

    @staticmethod
    def _prepare_output_fn(
        layouts: Any, _use_local: Any, _module: nn.Module, outputs: Any, _mesh: DeviceMesh
    ) -> Any:
        # Waited for here, where torch's own would return a tensor that waits when it is used.
        return outputs.redistribute(placements=layouts).to_local()


class FusedLinear(nn.Linear):
    """A layer that is several side by side, of each of which a rank has some outputs.

    torch divides such a product, but not its gradients: it would gather both of their factors.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's name
        """Compute this rank's outputs."""
        weight: Any = self.weight
        bias: Any = self.bias
        mesh, three = weight.device_mesh, weight.placements[0]
        given: Any = everywhere(mesh, input)
        found = functional.linear(
            given.to_local(grad_placements=[Partial()]),
            weight.to_local(),
            None if bias is None else bias.to_local(),
        )
        shape = torch.Size((*found.shape[:-1], self.out_features))
        output = DTensor.from_local(
            found, mesh, [_StridedShard(found.dim() - 1, split_factor=three.split_factor)],
            run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip
        return output if is_inside() else whole(output)


def fuse(module: nn.Linear, mesh: DeviceMesh, num: int) -> None:
    """Give each rank of a mesh its outputs of the `num` layers that one is."""
    three: Any = _StridedShard(0, split_factor=num)
    for name, param in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, divide(param, mesh, three))
    module.__class__ = FusedLinear


def divide(param: nn.Parameter, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
    """Return a parameter that all ranks have alike, divided."""
    parts = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(parts, requires_grad=param.requires_grad)


def is_fused(tensor: torch.Tensor) -> bool:
    """Return whether a rank's part of a tensor is several parts of it."""
    return isinstance(tensor, DTensor) and any(
        isinstance(placement, _StridedShard) for placement in tensor.placements
    )


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fused layer's tensor with one part on each rank; a collective. Others stay."""
    if isinstance(tensor, DTensor) and is_fused(tensor):
        return tensor.redistribute(placements=[Shard(0)])
    return tensor


def separated(tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return what `contiguous` gave divided as `live` is; a collective."""
    assert isinstance(tensor, DTensor)  # noqa: S101  for the type checker
    assert isinstance(live, DTensor)  # noqa: S101
    return tensor.redistribute(placements=live.placements)


def stripes(tensor: DTensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Return the parts of a fused layer's tensor that are here, and where in it they begin."""
    placement: Any = tensor.placements[0]
    local, dim = tensor.to_local(), placement.dim
    place: Any = tensor.device_mesh.get_coordinate()  # also when its group has ended
    rank, num_ranks = place[0], tensor.device_mesh.size()
    parts = local.chunk(placement.split_factor, dim)
    found = []
    for number, part in enumerate(parts):
        offset = [0] * tensor.dim()
        offset[dim] = (number * num_ranks + rank) * part.shape[dim]
        found.append((tuple(offset), part))
    return found
