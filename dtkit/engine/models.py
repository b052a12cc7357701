"""Finding the models that an optimizer's parameters belong to, and whose they already are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine.living import alive, living, noted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "BY_DDP",
    "already_distributed",
    "averages_itself",
    "find_models",
    "live_replicas",
    "named_in",
    "optimizers_used",
    "parameters_of",
    "running_statistics",
    "sparse_parameters",
    "state_of",
    "uses_distributed",
    "weight_ids",
]


BY_DDP = "its model is wrapped in DistributedDataParallel"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return an optimizer's parameters, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def weight_ids(value: object) -> set[int]:
    """Return the ids of the parameters of a model or an optimizer; none of anything else."""
    if isinstance(value, nn.Module):
        return {id(param) for param in value.parameters()}
    if isinstance(value, torch.optim.Optimizer):
        return {id(param) for param in parameters_of(value)}
    return set()


def find_models(params: Iterable[torch.Tensor]) -> list[nn.Module]:
    """Return the outermost live modules that hold any of `params`, in the order of `params`.

    An optimizer knows its parameters and not their modules, and a cell may keep
    a model anywhere; so every live module is looked at: those that were noted, and
    all if a parameter is in none of these. Garbage that was not collected yet counts
    as live, and it may differ between ranks.
    """
    index = {id(p): i for i, p in enumerate(params)}
    if not index:
        return []
    found = _holders(index, noted(nn.Module))
    if len({i for held, _, _ in found for i in held}) < len(index):
        found = _holders(index, living(nn.Module))
    # Not in the order of gc, which depends on when it last ran.
    return [module for _, _, module in sorted(found, key=lambda entry: entry[:2])]


def _holders(
    index: Mapping[int, int], modules: Sequence[nn.Module]
) -> list[tuple[list[int], str, nn.Module]]:
    """Return the outermost of the modules that hold parameters: which, their class, themselves."""
    inner = {id(child) for m in modules for child in m.__dict__.get("_modules", {}).values()}
    found = []
    for module in modules:
        if id(module) not in inner and "_parameters" in module.__dict__:
            held = [index[id(p)] for p in module.parameters() if id(p) in index]
            if held:
                found.append((held, type(module).__name__, module))
    return found


def live_replicas() -> list[DistributedDataParallel]:
    """Return the DDP models that are alive; one whose constructor raised is none."""
    return [module for module in alive(DistributedDataParallel) if "reducer" in vars(module)]


def state_of(models: Iterable[nn.Module], params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parameters and all parameters and buffers of the models, each once."""
    tensors = {id(p): p for p in params}
    for model in models:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensors.setdefault(id(tensor), tensor)
    return list(tensors.values())


def already_distributed(params: Sequence[torch.Tensor], models: Iterable[nn.Module]) -> str | None:
    """Return who averages these gradients already, None if nobody does."""
    if any(type(p).__name__ == "DTensor" for p in params):
        return "its parameters are DTensors (FSDP or tensor parallel)"
    if any(type(p).__name__ == "FlatParameter" for p in params):
        return "its model is wrapped in FullyShardedDataParallel"
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                return BY_DDP
    return None


def averages_itself(optimizer: object) -> bool:
    """Return whether an optimizer combines its gradients over the ranks, as Horovod's does."""
    return bool(getattr(optimizer, "_dtkit_distributed", False))


def optimizers_used(source: str, namespace: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """Return the optimizers of earlier cells that a cell names and does not make anew."""
    return [
        value
        for name, value in namespace.items()
        if issubclass(type(value), torch.optim.Optimizer) and _is_taken_over(name, source)
    ]


def uses_distributed(source: str, namespace: Mapping[str, Any]) -> bool:
    """Return whether a cell uses an optimizer of an earlier cell that combines gradients itself."""
    return any(averages_itself(optimizer) for optimizer in optimizers_used(source, namespace))


def named_in(source: str, namespace: Mapping[str, Any]) -> list[nn.Module]:
    """Return the models in a namespace that a cell goes on with."""
    values = [
        v.model if getattr(type(v), "dtkit_model", False) else v
        for k, v in namespace.items()
        if _is_taken_over(k, source)
    ]
    return [v for v in values if issubclass(type(v), nn.Module)]


def _is_taken_over(name: str, source: str) -> bool:
    """Return whether a cell uses what an earlier one left under a name."""
    lines = (line for line in source.splitlines() if re.search(rf"\b{name}\b", line))
    first = next(lines, None)
    if first is None:
        return False
    made_anew = re.match(rf"\s*{name}\s*=(?!=)(.*)", first)
    return made_anew is None or re.search(rf"\b{name}\b", made_anew[1]) is not None


def running_statistics(models: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the float buffers that training changes on each rank differently."""
    return [
        statistic
        for model in models
        for module in model.modules()
        if isinstance(module, _NormBase) and not isinstance(module, SyncBatchNorm)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]


def sparse_parameters(models: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the parameters whose gradients are sparse."""
    return [
        module.weight
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
