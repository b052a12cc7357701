"""State dictionaries taken apart: tensors under flat names, and an outline of all the rest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["assemble", "dismantle", "leaves", "renamed", "state_here"]

# Any, throughout: state dictionaries are nested values of any kind.

_MARK = "dtkit.tensor"
"""First item of the tuple that stands in an outline for a tensor; the second is its name."""


def state_here(thing: Any) -> Any:
    """Return the state of an object, as far as it is on this rank."""
    state = thing.state_dict()
    if not isinstance(thing, torch.nn.Module):
        return state
    # What is on the meta device is a stage of a pipeline that another rank has.
    return {
        name: value
        for name, value in state.items()
        if not (isinstance(value, torch.Tensor) and value.is_meta)
    }


def dismantle(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the outline of a value, having put its tensors into `tensors` under `name/…`.

    An outline holds dictionaries, lists, tuples and plain values only, so that
    `torch.load(weights_only=True)` reads it.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return (_MARK, name)
    if isinstance(value, dict):
        return _like(value, {k: dismantle(v, f"{name}/{k}", tensors) for k, v in value.items()})
    if type(value) in (list, tuple):
        items = [dismantle(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value.item() if isinstance(value, np.generic) else value


def assemble(outline: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `dismantle` took apart."""
    return _replace(outline, lambda name: tensors[name])


def renamed(outline: Any, names: dict[str, str]) -> Any:
    """Return the outline with its tensors under other names, as far as `names` has them."""
    return _replace(outline, lambda name: (_MARK, names.get(name, name)))


def leaves(outline: Any) -> Iterator[str]:
    """Yield the names of the tensors of an outline."""
    if _is_mark(outline):
        yield outline[1]
    elif isinstance(outline, dict):
        for item in outline.values():
            yield from leaves(item)
    elif isinstance(outline, list | tuple):
        for item in outline:
            yield from leaves(item)


def _replace(outline: Any, make: Callable[[str], Any]) -> Any:
    if _is_mark(outline):
        return make(outline[1])
    if isinstance(outline, dict):
        return _like(outline, {k: _replace(v, make) for k, v in outline.items()})
    if type(outline) in (list, tuple):  # of a named tuple, writing says what is wrong with it
        return type(outline)(_replace(v, make) for v in outline)
    return outline


def _like(value: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    # MultiStepLR counts with one. Of other kinds `weights_only` lets no more through, or they do
    # without.
    return Counter(content) if type(value) is Counter else content


def _is_mark(outline: Any) -> bool:
    return isinstance(outline, tuple) and len(outline) == 2 and outline[0] == _MARK  # noqa: PLR2004
