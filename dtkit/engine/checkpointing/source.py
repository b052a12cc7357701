"""What a cell trains, found where it lies: the objects that a checkpoint of it must hold."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dtkit.engine.living import living
from dtkit.engine.models import find_models, parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import FrameType

    from torch.optim import Optimizer

__all__ = ["find_objects"]

# Any, throughout: the user's own objects.


def find_objects(
    optimizers: Iterable[Optimizer],
    namespace: Mapping[str, Any],
    frame: FrameType | None,
    known: Mapping[Any, str],
) -> dict[str, Any]:
    """Return the optimizers, with their models, schedulers and GradScalers, by name.

    The name is that of the variable that holds an object, looked for in the
    functions that are running and then in the namespace; without one it is
    the object's kind and a number. The same on all ranks, as the cell is.

    Args:
        optimizers: that the cell uses.
        namespace: of the cell.
        frame: innermost of the functions that are running.
        known: names that objects had before.
    """
    optimizers = list(optimizers)
    if not optimizers:
        return {}
    names = {id(thing): name for thing, name in known.items()}
    scalers = []
    for variables in [*_variables(frame), namespace]:
        for name, value in list(variables.items()):
            if not name.startswith("_"):
                names.setdefault(id(value), name)
                # type(), not isinstance: an arbitrary object's __class__ may run code.
                if issubclass(type(value), torch.amp.GradScaler) and value.is_enabled():
                    scalers.append(value)
    found = [
        *find_models([p for optimizer in optimizers for p in parameters_of(optimizer)]),
        *optimizers,
        *_schedulers(optimizers),
        *scalers,
    ]
    return _named(found, names)


def _named(found: list[Any], names: Mapping[int, str]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for thing in {id(thing): thing for thing in found}.values():
        name = names.get(id(thing), "")
        if not name or name in named:
            kind = type(thing).__name__
            counts[kind] = counts.get(kind, 0) + 1
            name = f"{kind}-{counts[kind]}"
        named[name] = thing
    return named


def _schedulers(optimizers: list[Optimizer]) -> list[LRScheduler]:
    """Return the live schedulers of these optimizers, in the optimizers' order.

    Several of one optimizer keep the order in which they were made: the garbage
    collector lists objects of a generation so.
    """
    index = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
    found = [s for s in living(LRScheduler) if id(getattr(s, "optimizer", None)) in index]
    return sorted(found, key=lambda s: (index[id(s.optimizer)], type(s).__name__))


def _variables(frame: FrameType | None) -> Iterator[Mapping[str, Any]]:
    """Yield the local variables of the user's functions, innermost first."""
    while frame is not None and frame.f_code.co_name != "<module>":
        if not frame.f_code.co_filename.startswith((sys.prefix, sys.base_prefix)):
            module = frame.f_globals.get("__name__", "")
            if module.partition(".")[0] not in ("torch", "dtkit"):
                yield frame.f_locals
        frame = frame.f_back
