"""Refill: a new engine is given what the cells have made on a healthy rank.

One pickle holds all names, so what belongs together stays together: an optimizer
keeps the parameters of its model. Functions of cells keep looking their names up
in the namespace, as they did.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import Any

import cloudpickle
import torch
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine import randomness, weights
from dtkit.engine.models import weight_ids
from dtkit.engine.parallel.layout import laid_out
from dtkit.engine.process.agent import agent, install
from dtkit.engine.process.shell import current_shell

__all__ = ["accept", "equalize", "export"]

# Any: the user's own objects.

_NAMESPACE = "namespace"


def export() -> tuple[bytes, list[str], list[str]]:
    """Return this rank's names and random states, pickled.

    Returns:
        The pickle, the names in it, and those left out since they cannot be pickled.
    """
    names = _names()
    try:
        payload = _dumps(names)
        left_out: list[str] = []
    except Exception:  # noqa: BLE001  any object may refuse, each in its own way
        left_out = [name for name, value in names.items() if not _can_pickle(value)]
        names = {name: value for name, value in names.items() if name not in left_out}
        payload = _dumps(names)
    return payload, list(names), left_out


def accept(payload: bytes) -> None:
    """Put what `export` gave into this rank's namespace, and its random states in place.

    DistributedDataParallel models join the next group.
    """
    install()
    found = _Unpickler(io.BytesIO(payload)).load()
    namespace = current_shell().user_ns
    namespace.update(found["names"])
    for name in found["given"]:
        # The donor's rank, for one: functions that use it have brought it along.
        namespace.pop(name, None)
    randomness.restore(found["random"])
    agent().detached += found["models"]


def equalize(names: list[str], donor: int) -> list[str]:
    """Make models and optimizers of these names equal to those of one rank; return them.

    Survivors may be a step apart: one had the sum when another lost it. What ranks hold in
    parts is left alone, and so is what is not alike on all ranks.
    """
    group = torch.distributed.group.WORLD
    assert group is not None  # noqa: S101  it was just built
    parts = _held_in_parts()
    done = []
    for name in sorted(names):
        value = current_shell().user_ns.get(name)
        tensors = [] if weight_ids(value) & parts else _state_of(value)
        if weights.are_alike(tensors, group) and tensors:
            weights.equalize(tensors, group, donor)
            done.append(name)
    return done


def _names() -> dict[str, Any]:
    shell = current_shell()
    hidden = shell.user_ns_hidden
    return {
        name: value
        for name, value in shell.user_ns.items()
        if not name.startswith("_") and (name not in hidden or value is not hidden[name])
    }


def _dumps(names: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    pickler = _Pickler(target)
    given = list(current_shell().user_ns.get("_dtkit_given", ()))
    given = [name for name in given if name not in names]
    state = randomness.snapshot()
    pickler.dump({"names": names, "given": given, "random": state, "models": pickler.models})
    return target.getvalue()


def _can_pickle(value: Any) -> bool:
    with contextlib.suppress(Exception):
        _Pickler(io.BytesIO()).dump(value)
        return True
    return False


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.models: list[DistributedDataParallel] = []
        # What cloudpickle is to give functions of cells as their globals.
        self._cells: dict[str, Any] = {}
        self.globals_ref[id(current_shell().user_ns)] = self._cells

    def persistent_id(self, value: Any) -> str | None:
        return _NAMESPACE if value is self._cells else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) is DistributedDataParallel:
            self.models.append(value)
            held = ("process_group", "reducer", "logger")
            state = {k: v for k, v in vars(value).items() if k not in held}
            return _bare_ddp, (), state, None, None, _set_attributes
        return super().reducer_override(value)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: str) -> Any:
        if pid != _NAMESPACE:
            msg = f"no persistent {pid!r}"
            raise pickle.UnpicklingError(msg)
        return current_shell().user_ns


def _bare_ddp() -> DistributedDataParallel:
    return DistributedDataParallel.__new__(DistributedDataParallel)


def _set_attributes(model: DistributedDataParallel, state: dict[str, Any]) -> None:
    vars(model).update(state)


def _held_in_parts() -> set[int]:
    """Return the ids of the weights of models that several ranks hold together."""
    return set().union(*map(weight_ids, laid_out()))


def _state_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a model or an optimizer; none of anything else, or if sharded."""
    tensors: list[torch.Tensor] = []
    if isinstance(value, torch.nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
    elif isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            for parameter in group["params"]:
                state = value.state.get(parameter, {})
                tensors += [v for _, v in sorted(state.items()) if isinstance(v, torch.Tensor)]
    is_plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    return tensors if is_plain else []
