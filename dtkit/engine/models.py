"""Finding the models that an optimizer's parameters belong to, and whose they already are."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["already_distributed", "find_models", "running_statistics", "sparse_parameters"]


def find_models(params: Iterable[nn.Parameter]) -> list[nn.Module]:
    """Return the outermost live modules that hold any of `params`.

    An optimizer knows its parameters and not their modules, and a cell may keep
    a model anywhere; so every live module is looked at. Takes some ten
    milliseconds, once per optimizer.
    """
    wanted = {id(p) for p in params}
    # type(), not isinstance: an arbitrary object's __class__ may run code.
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    inner = {id(child) for m in modules for child in m.__dict__.get("_modules", {}).values()}
    return [
        m
        for m in modules
        if id(m) not in inner
        and "_parameters" in m.__dict__
        and any(id(p) in wanted for p in m.parameters())
    ]


def already_distributed(params: list[nn.Parameter], models: list[nn.Module]) -> str | None:
    """Return who averages these gradients already, None if nobody does."""
    if any(type(p).__name__ == "DTensor" for p in params):
        return "its parameters are DTensors (FSDP or tensor parallel)"
    if any(type(p).__name__ == "FlatParameter" for p in params):
        return "its model is wrapped in FullyShardedDataParallel"
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                return "its model is wrapped in DistributedDataParallel"
    return None


def running_statistics(models: list[nn.Module]) -> list[torch.Tensor]:
    """Return the float buffers that training changes on each rank differently."""
    return [
        statistic
        for model in models
        for module in model.modules()
        if isinstance(module, _NormBase) and not isinstance(module, SyncBatchNorm)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]


def sparse_parameters(models: list[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters whose gradients are sparse."""
    return [
        module.weight
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
