"""Collectives as they are called, whoever calls them: when, with what, and when they were done.

The functions of `torch.distributed` are replaced for the length of a run, so the
gradients' buckets and the cell's own collectives are seen alike. DDP calls its own
in C++, until it is given a communication hook (`dtkit.engine.trace.ddp`).
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from dtkit.engine.models import find_models
from dtkit.engine.patches import replaced
from dtkit.engine.reduce.buckets import Bucket
from dtkit.trace.rows import OPERATIONS, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Collectives", "Launch"]

_FUNCTIONS = {
    "all_reduce": "ALLREDUCE",
    "all_gather": "ALLGATHER",
    "all_gather_single": "ALLGATHER",
    "all_gather_into_tensor": "ALLGATHER",
    "broadcast": "BROADCAST",
    "reduce_scatter_tensor": "REDUCESCATTER",
    "all_to_all_single": "ALLTOALL",
    "barrier": "BARRIER",
}
_CALL, _DONE, _OUT_START, _OUT_END = 5, 6, 7, 8
_Row = list[int]
"""The fields of `dtkit.trace.rows.Collective`, filled in as they become known."""

# Any, below: arguments of torch's functions, passed on as they are.


@dataclass(slots=True, eq=False)
class Launch:
    """A bucket of gradients, whose collectives are about to be called.

    Attributes:
        params: whose gradients it holds.
        ready_ns: when the last of them was there.
        tensors: number of its row in the trace, by operation.
        row: its last collective, while it is not finished.
    """

    params: Sequence[torch.Tensor]
    ready_ns: int = 0
    tensors: dict[int, int] = field(default_factory=dict)
    row: _Row | None = None


class Collectives:
    """Records the collectives of this rank.

    Args:
        on_wait: called with start and end, in nanoseconds, of a collective that
            the training thread waited for.
    """

    def __init__(self, on_wait: Callable[[int, int], None]) -> None:
        self.rows: list[_Row] = []
        self.groups: dict[int, tuple[int, ...]] = {}
        self.tensors: dict[int, Tensors] = {}
        self._on_wait = on_wait
        self._group_numbers: dict[tuple[int, ...], int] = {}
        self._tensor_numbers: dict[Any, int] = {}
        self._sequences: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._launching: Launch | None = None
        # Weakly: buckets are laid out anew, and another may come to lie where one was.
        self._launches: WeakKeyDictionary[Bucket, Launch] = WeakKeyDictionary()

    def take(self) -> list[_Row]:
        """Return the rows since the last call; those under way are completed later."""
        rows, self.rows = self.rows, []
        return rows

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record within the context."""
        with ExitStack() as stack:
            for name, operation in _FUNCTIONS.items():
                if not hasattr(dist, name):
                    continue  # of another version of torch
                make = partial(self._recorded, OPERATIONS.index(operation))
                stack.enter_context(replaced(dist, name, make))
            stack.enter_context(replaced(Bucket, "launch", self._launch))
            stack.enter_context(replaced(Bucket, "finish", self._finish))
            yield

    def _recorded(self, operation: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            row = self._begin(operation, args, kwargs)
            work = original(*args, **kwargs)
            if isinstance(work, dist.Work):
                # On a thread of the backend: it only notes the time.
                work.get_future().add_done_callback(
                    lambda _future: row.__setitem__(_DONE, time.perf_counter_ns())
                )
            else:
                row[_DONE] = time.perf_counter_ns()
                self._on_wait(row[_CALL], row[_DONE])
            return work

        return collective

    def _begin(self, operation: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Row:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        tensor = tensors[-1] if tensors else None  # what is handed in comes after the output
        group = kwargs.get("group")
        if group is None:
            group = next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        number = self._group_number(group)
        sequence = self._sequences[number] = self._sequences.get(number, 0) + 1
        call_ns = time.perf_counter_ns()
        launch = self._launching
        row = [
            operation, number, sequence, self._tensor_number(operation, tensor),
            call_ns if launch is None else launch.ready_ns, call_ns, 0, 0, 0,
            tensor.numel() * tensor.element_size() if tensor is not None else 0,
        ]  # fmt: skip
        self.rows.append(row)
        if launch is not None:
            launch.row = row
        return row

    @contextmanager
    def launching(self, launch: Launch) -> Iterator[None]:
        """Let the collectives within the context be those of a bucket that is ready now."""
        self._launching, launch.ready_ns = launch, time.perf_counter_ns()
        try:
            yield
        finally:
            self._launching = None

    def _launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def launch(bucket: Bucket, *args: Any, **kwargs: Any) -> Any:
            found = self._launches.get(bucket)
            if found is None:
                found = self._launches[bucket] = Launch(bucket.params)
            with self.launching(found):
                return original(bucket, *args, **kwargs)

        return launch

    def _finish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def finish(bucket: Bucket, *args: Any, **kwargs: Any) -> Any:
            start_ns = time.perf_counter_ns()
            result = original(bucket, *args, **kwargs)
            launch = self._launches.get(bucket)
            if launch is not None and launch.row is not None:
                launch.row[_OUT_START], launch.row[_OUT_END] = start_ns, time.perf_counter_ns()
                launch.row = None
            return result

        return finish

    def _group_number(self, group: dist.ProcessGroup | None) -> int:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        number = self._group_numbers.get(ranks)
        if number is None:
            number = self._group_numbers[ranks] = len(self._group_numbers)
            self.groups[number] = ranks
        return number

    def _tensor_number(self, operation: int, tensor: torch.Tensor | None) -> int:
        launch = self._launching
        if launch is not None and launch.params:
            if operation not in launch.tensors:
                names = self._names_of(launch.params)
                launch.tensors[operation] = self._name(operation, tensor, names)
            return launch.tensors[operation]
        # Like Horovod's names for what has none; those of one kind share one.
        own = getattr(tensor, "dtkit_name", None)
        key = (operation, own, () if tensor is None or own else tuple(tensor.shape))
        if key not in self._tensor_numbers:
            name = own or f"noname.{len(self._tensor_numbers)}"
            self._tensor_numbers[key] = self._name(operation, tensor, [name])
        return self._tensor_numbers[key]

    def _name(self, operation: int, tensor: torch.Tensor | None, names: Sequence[str]) -> int:
        kind = OPERATIONS[operation].lower()
        number = len(self.tensors)
        self.tensors[number] = Tensors(
            tuple(f"{kind}.{name}" for name in names),
            "" if tensor is None else str(tensor.dtype).removeprefix("torch."),
            () if tensor is None else tuple(tensor.shape),
        )
        return number

    def _names_of(self, params: Sequence[torch.Tensor]) -> list[str]:
        """Return the names of parameters in their models."""
        if any(id(p) not in self._names for p in params):
            for model in find_models(params):
                for name, param in model.named_parameters():
                    self._names[id(param)] = name
        return [self._names.get(id(p), f"noname.{i}") for i, p in enumerate(params)]
