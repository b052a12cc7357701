"""What `%dist_check` compares: a digest of everything that ranks should have alike."""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from dtkit.engine import weights
from dtkit.engine.drawn import Drawn
from dtkit.engine.process.agent import agent
from dtkit.engine.process.shell import current_shell
from dtkit.engine.process.transfer import lookup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["block", "collect"]

# Any, below: the user's own objects, and JSON.

_BLOCK = 1 << 20
"""Elements of a tensor that are compared number by number, from the first that differs."""
_HEX = "08x"


def collect(names: Sequence[str]) -> dict[str, Any]:
    """Return what this rank has.

    Args:
        names: what to look at; none: every model, optimizer and divided loader by name.

    Returns:
        parts: by path, `kind`, `digest` and `about`; missing: names that there are not;
        random: digests of the generators; data: by loader, how often each sample was drawn.

    Raises:
        TypeError: a name is nothing that can be compared.
    """
    found, missing = {}, []
    for name in names:
        try:
            found[name] = lookup(name)
        except (NameError, AttributeError):
            missing.append(name)
    if not names:
        found = _by_name((nn.Module, Optimizer))
    parts = {path: _described(kind, value) for path, kind, value in _parts(found)}
    return {
        "parts": parts,
        "missing": missing,
        "random": _random(),
        "data": _data() if not names else {},
    }


def block(path: str, names: Sequence[str], number: int | None) -> Any:
    """Return the digests of a tensor's blocks, or one block as float64.

    Args:
        path: as `collect` gave it.
        names: as `collect` got them.
        number: of the block; None: the digests of all.
    """
    found = {name: lookup(name) for name in names} or _by_name((nn.Module, Optimizer))
    value = next(v for p, _, v in _parts(found) if p == path)
    if not isinstance(value, torch.Tensor):
        return None if number is None else value
    pieces = value.detach().reshape(-1).split(_BLOCK)
    if number is None:
        return [weights.digest(piece) for piece in pieces]
    return pieces[number].cpu().double().numpy()


def _by_name(kinds: tuple[type, ...]) -> dict[str, Any]:
    """Return the objects of some kinds in the namespace, each under its first name."""
    seen: set[int] = set()
    found = {}
    for name, value in list(current_shell().user_ns.items()):
        # type(), not isinstance: an arbitrary object's __class__ may run code.
        if not name.startswith("_") and issubclass(type(value), kinds) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def _parts(found: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield path, kind and value of everything in these objects."""
    params: dict[int, str] = {}
    for name, value in found.items():
        if isinstance(value, nn.Module):
            for path, param in value.named_parameters():
                params.setdefault(id(param), f"{name}.{path}")
                yield f"{name}.{path}", "parameter", param
            for path, buffer in value.named_buffers():
                yield f"{name}.{path}", "buffer", buffer
        elif not isinstance(value, Optimizer):
            yield from _others(name, value)
    for name, value in found.items():
        if isinstance(value, Optimizer):
            yield from _optimizer(name, value, params)


def _others(name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, "tensor", value
    elif callable(getattr(value, "state_dict", None)):
        yield from ((path, "state", leaf) for path, leaf in _leaves(name, value.state_dict()))
    else:
        msg = (
            f"{name} ({type(value).__name__}) has nothing to compare: name models, optimizers, "
            "tensors, or what has a state_dict"
        )
        raise TypeError(msg)


def _optimizer(
    name: str, optimizer: Optimizer, params: dict[int, str]
) -> Iterator[tuple[str, str, Any]]:
    number = 0
    for i, group in enumerate(optimizer.param_groups):
        settings = {k: v for k, v in group.items() if k != "params"}
        for path, leaf in _leaves(f"{name}.param_groups[{i}]", settings):
            yield path, "setting", leaf
        for param in group["params"]:
            label = params.get(id(param), str(number))
            for path, leaf in _leaves(f"{name}.state[{label}]", optimizer.state.get(param, {})):
                yield path, "optimizer state", leaf
            number += 1


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(f"{path}[{i}]", inner)
    else:
        yield path, value


def _described(kind: str, value: Any) -> tuple[str, str, str]:
    """Return kind, digest and a few words."""
    if not isinstance(value, torch.Tensor):
        text = repr(value)
        return kind, format(zlib.crc32(text.encode()), _HEX), text[:80]
    if type(value).__name__ == "DTensor" or value.is_meta:
        return kind, "", "each rank has its own part"
    about = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value.layout != torch.strided:
        value = value.to_dense()
    return kind, format(weights.digest(value), _HEX), about


def _random() -> dict[str, str]:
    states: dict[str, bytes] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()).encode(),  # noqa: NPY002  the one that cells use
        "python": repr(random.getstate()).encode(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return {name: format(zlib.crc32(state), _HEX) for name, state in states.items()}


def _data() -> dict[str, dict[str, Any]]:
    """Return what this rank draws of each loader: as its newest pass did, or its sampler would."""
    found = {}
    for name, loader in _by_name((DataLoader,)).items():
        drawn = agent().drawn.get(loader)
        if drawn is None and type(loader.sampler) is DistributedSampler:
            drawn = Drawn(len(loader.dataset))
            drawn.add(list(loader.sampler))
            drawn.is_whole = True
        if drawn is not None:
            found[name] = {"counts": drawn.counts.tobytes(), "is_whole": drawn.is_whole}
    return found
