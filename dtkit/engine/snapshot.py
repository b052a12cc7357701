"""The state that a cell starts from, kept and put back: so that it can be run again from there.

Everything that the notebook's names lead to is noted, object by object, and put back in place.
So two names of one model stay two names of one model, an optimizer keeps its parameters, and a
function of an earlier cell goes on to see the same objects. Random generators are put back too.
What cannot be put back is a cursor: a generator that is half used up, an open file.
"""

from __future__ import annotations

import contextlib
import gc
import random
import re
import sys
from collections import deque
from types import (
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dtkit.engine import randomness
from dtkit.engine.process.agent import agent
from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["drop", "restore", "take"]

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.device,
          torch.dtype, torch.Size)  # fmt: skip
_NOT_OURS = ("IPython", "ipykernel", "ipyparallel", "zmq", "traitlets", "dtkit", "asyncio",
             "threading", "logging", "concurrent", "multiprocessing", "weakref")  # fmt: skip
"""Packages whose objects are left as they are: what they hold is no state of a cell."""
_SHELL_NAMES = ("In", "Out", "exit", "quit", "get_ipython", "open")

# Any, throughout: the user's own objects.
Restore = "Callable[[], None]"


class Snapshot:
    """The names of a namespace, and the state of all that they lead to.

    Args:
        namespace: the user's names.

    Attributes:
        num_bytes: memory that the copies take.
        cursors: names whose objects cannot be put back.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.num_bytes: int = 0
        self.cursors: list[str] = []
        self._namespace = namespace
        self._names = {name: namespace[name] for name in _users(namespace)}
        # Everything noted is held: an id must not be given to another object.
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._random = randomness.snapshot()
        for name, value in self._names.items():
            if isinstance(value, GeneratorType):
                self.cursors.append(name)
        self._note_all(self._names.values())

    def restore(self) -> None:
        """Put everything back as it was."""
        for name in _users(self._namespace):
            if name not in self._names:
                del self._namespace[name]
        self._namespace.update(self._names)
        with torch.no_grad():
            for undo in self._undo:
                undo()
        randomness.restore(self._random)

    def _note_all(self, roots: Iterable[Any]) -> None:
        # A queue, not recursion: a linked structure may be deeper than the stack.
        waiting = deque(roots)
        while waiting:
            value = waiting.popleft()
            # type(), not isinstance: an arbitrary object's __class__ may run code.
            if id(value) in self._seen or issubclass(type(value), _ATOMS):
                continue
            self._seen[id(value)] = value
            waiting.extend(self._note(value))

    def _note(self, value: Any) -> Iterable[Any]:
        """Note how to put one object back; returns what it leads to."""
        kind = type(value)
        if issubclass(kind, torch.Tensor):
            return self._note_tensor(value)
        if issubclass(kind, np.ndarray):
            return self._note_array(value)
        if issubclass(kind, (tuple, frozenset)):
            return tuple(value)
        if issubclass(kind, (FunctionType, MethodType)):
            return _held_by_function(value)
        if kind.__module__.partition(".")[0] in _NOT_OURS:
            return ()
        attributes = [*self._note_attributes(value), *self._note_slots(value, kind)]
        return [*self._note_content(value, kind), *attributes]

    def _note_content(self, value: Any, kind: type) -> Iterable[Any]:
        if issubclass(kind, dict):
            kept = dict(value)
            self._undo.append(lambda: _refill(value, kept))
            return [*kept.keys(), *kept.values()]
        if issubclass(kind, (list, deque)):
            items = list(value)
            self._undo.append(lambda: _reextend(value, items))
            return items
        if issubclass(kind, set):
            members = set(value)
            self._undo.append(lambda: (value.clear(), value.update(members))[0])
            return members
        if issubclass(kind, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state) and None)
        elif issubclass(kind, random.Random):
            python = value.getstate()
            self._undo.append(lambda: value.setstate(python))
        elif issubclass(kind, np.random.Generator):
            bits = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bits))
        return ()

    def _note_attributes(self, value: Any) -> Iterable[Any]:
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is not dict:
            return ()
        kept = dict(attributes)
        self._undo.append(lambda: _refill(attributes, kept))
        return list(kept.values())

    def _note_slots(self, value: Any, kind: type) -> Iterable[Any]:
        """Note attributes that are in no dictionary, as of a `dataclass(slots=True)`."""
        kept = []
        for member in _slots_of(kind):
            with contextlib.suppress(AttributeError):  # it was not assigned yet
                kept.append((member, member.__get__(value, kind)))
        if kept:
            self._undo.append(lambda: _reassign(value, kept))
        return [content for _, content in kept]

    def _note_tensor(self, tensor: torch.Tensor) -> Iterable[Any]:
        is_leaf, needs_grad, grad = tensor.is_leaf, tensor.requires_grad, None
        if is_leaf:
            grad = tensor.grad
        if tensor.layout != torch.strided or tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
            return () if grad is None else (grad,)
        data = tensor.data
        # On the host, where there is room for a second one.
        kept = data.detach().to("cpu", copy=True)
        self.num_bytes += kept.numel() * kept.element_size()

        def undo() -> None:
            _write(tensor, data, kept)
            if is_leaf:
                tensor.requires_grad_(needs_grad)
                tensor.grad = grad

        self._undo.append(undo)
        return [*(() if grad is None else (grad,)), *self._note_attributes(tensor)]

    def _note_array(self, array: Any) -> Iterable[Any]:
        kept = array.copy()
        self.num_bytes += array.nbytes

        def undo() -> None:
            if array.flags.writeable:
                array[...] = kept

        self._undo.append(undo)
        return kept.ravel().tolist() if array.dtype == object else ()


def _write(tensor: torch.Tensor, data: torch.Tensor, kept: torch.Tensor) -> None:
    """Give a tensor its old storage and what was in it."""
    if tensor.data.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
        tensor.data = data  # it was moved, cast or given another storage
    is_expanded = any(s == 0 and n > 1 for s, n in zip(data.stride(), data.shape, strict=True))
    if not is_expanded:  # several elements in one place: whoever owns it puts it back
        data.copy_(kept)


def _refill(target: dict[Any, Any], kept: dict[Any, Any]) -> None:
    target.clear()
    target.update(kept)


def _slots_of(kind: type) -> Iterable[MemberDescriptorType]:
    for cls in kind.__mro__:
        if "__slots__" in vars(cls):
            yield from (m for m in vars(cls).values() if isinstance(m, MemberDescriptorType))


def _reassign(target: Any, kept: Iterable[tuple[MemberDescriptorType, Any]]) -> None:
    for member, content in kept:
        member.__set__(target, content)  # also of a frozen dataclass


def _reextend(target: Any, items: list[Any]) -> None:
    target.clear()
    target.extend(items)


def _held_by_function(function: Any) -> list[Any]:
    plain = getattr(function, "__func__", function)
    held = [cell.cell_contents for cell in plain.__closure__ or () if _has_content(cell)]
    held += [*(plain.__defaults__ or ()), *plain.__dict__.values()]
    return [*held, function.__self__] if isinstance(function, MethodType) else held


def _has_content(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that was not assigned yet
        return False


def _users(namespace: dict[str, Any]) -> list[str]:
    return [n for n in namespace if not n.startswith("_") and n not in _SHELL_NAMES]


def take(source: str) -> dict[str, Any]:
    """Keep this rank's state until `drop`.

    Returns:
        How large the copies are, and which of the cell's names cannot be put back.
    """
    owner = agent()
    owner.snapshot = Snapshot(current_shell().user_ns)
    words = set(re.findall(r"\w+", source))
    return {
        "num_bytes": owner.snapshot.num_bytes,
        "cursors": [name for name in owner.snapshot.cursors if name in words],
    }


def restore() -> None:
    """Put this rank's state back, and free what the cell left behind."""
    snapshot = agent().snapshot
    if snapshot is None:
        msg = "no state was kept on this rank"
        raise RuntimeError(msg)
    # A traceback holds the frames of a cell that ran out of memory, with its tensors.
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    snapshot.restore()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def drop() -> None:
    """Forget the state that was kept."""
    agent().snapshot = None
