"""Which parts of a model are sharded, gathered and let go of as one."""

from __future__ import annotations

from collections import Counter

from torch import nn

__all__ = ["choose_units"]


def choose_units(model: nn.Module, least: int) -> list[nn.Module]:
    """Return the modules to shard each by itself, inner ones first; the model itself comes last.

    A unit is a repeated block (one of several children of the same class, of a
    list or a Sequential), or else what is left of a module that has enough
    parameters. A unit is in memory as a whole while it computes: many small
    ones cost messages, few large ones memory.

    Args:
        model: the model.
        least: a unit has so many parameters at least, except for the model itself.
    """
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found: list[nn.Module] = []
    _visit(model, least, uses, found)
    return [*found, model]


def _visit(module: nn.Module, least: int, uses: Counter[int], found: list[nn.Module]) -> None:
    children = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    kinds = Counter(type(child) for child in children)
    for child in dict.fromkeys(children):
        if _size(child) < least or _is_shared(child, uses):
            _visit_inside(child, least, uses, found)
        elif is_list and kinds[type(child)] > 1 and not _is_container(child):
            found.append(child)
        else:
            taken = len(found)
            _visit(child, least, uses, found)
            inside = sum(_size(unit) for unit in found[taken:])
            if _size(child) - inside >= least and not _is_container(child):
                found.append(child)


def _visit_inside(
    module: nn.Module, least: int, uses: Counter[int], found: list[nn.Module]
) -> None:
    if _size(module) >= least:
        _visit(module, least, uses, found)


def _is_container(module: nn.Module) -> bool:
    # Nobody calls a list: it has no forward pass in which it could be gathered.
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _is_shared(module: nn.Module, uses: Counter[int]) -> bool:
    """Return whether a parameter in a module is one of another module, too (tied weights)."""
    mine = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    return any(uses[key] > num for key, num in mine.items())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
