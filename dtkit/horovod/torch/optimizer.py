"""DistributedOptimizer: the user's optimizer, with gradients combined over the ranks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dtkit.horovod.engine import stand_back
from dtkit.horovod.reduction import Op
from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.adasum import DeltaMixin, unhooked
from dtkit.horovod.torch.basics import size
from dtkit.horovod.torch.compression import Compression, Compressor, Remembering
from dtkit.horovod.torch.gradients import Gradients, HowToReduce
from dtkit.horovod.torch.grouping import buckets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch
    from torch.optim import Optimizer

    from dtkit.engine.reduce.memory import Memory
    from dtkit.horovod.torch.grouping import Named

__all__ = ["DistributedOptimizer"]

_STEP_AFTER_SYNCHRONIZE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after "
    "optimizer.synchronize(). This can cause training slowdown: use\n"
    "    with optimizer.skip_synchronize():\n        optimizer.step()"
)


class DistributedMixin:
    """What a distributed optimizer has beside the user's own class."""

    _dtkit_distributed = True
    param_groups: list[dict[str, Any]]
    _gradients: Gradients | None = None
    _should_synchronize = True
    _is_synchronized = False

    def prepare(self, named: Named, gradients: Gradients | None, passes: int) -> None:
        """Take the parameters' names and what reduces their gradients; None: nothing does."""
        self._parameter_names = {param: name for name, param in named}
        self._gradients = gradients
        self.backward_passes_per_step: int = passes
        compressed = None if gradients is None else gradients.compressed
        self._momentum = None if compressed is None else compressed.momentum
        if self._momentum is not None:
            self._momentum.made(self)  # type: ignore[arg-type]  # the user's class is an Optimizer

    @property
    def dtkit_compression(self) -> str:
        """The method that remembers what it left out; checkpoints hold that."""
        compressed = None if self._gradients is None else self._gradients.compressed
        return "none" if compressed is None else str(compressed.method)

    def take_part_in(self, memory: Memory) -> None:
        """Let a run's checkpoints hold what compression leaves out here."""
        if self._gradients is not None:
            self._gradients.take_part_in(memory)

    def synchronize(self) -> None:
        """Wait until the gradients are combined, also those of unused parameters.

        Clipping and GradScaler need it only for these: what a backward pass
        brought is combined when `backward()` returns.
        """
        if self._gradients is not None:
            self._gradients.finish()
        self._is_synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` inside use the gradients as they are."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Set how many backward passes make a step; their gradients are summed.

        Raises:
            ValueError: fewer than one.
        """
        self.backward_passes_per_step = _checked_passes(passes)
        if self._gradients is not None:
            self._gradients.reset(passes)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine what is not combined yet, and let the optimizer step."""
        __tracebackhide__ = True
        if self._momentum is not None and closure is not None:
            msg = f"{self.dtkit_compression} applies the momentum itself: step() without a closure"
            raise NotImplementedError(msg)
        if self._should_synchronize and closure is None:
            if self._is_synchronized:
                warnings.warn(_STEP_AFTER_SYNCHRONIZE, stacklevel=2)
            self.synchronize()
        self._is_synchronized = False
        if self._momentum is not None:
            self._momentum.suspend(self)  # type: ignore[arg-type]
        try:
            inner = unhooked(super().step)  # type: ignore[misc]  # the user's class
            result = inner(self._wrapped(closure))
        finally:
            if self._momentum is not None:
                self._momentum.resume(self)  # type: ignore[arg-type]
        if self._gradients is not None:
            self._gradients.reset()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Raises:
            AssertionError: there are some that were neither combined nor used.
        """
        if self._gradients is not None:
            if self._gradients.is_begun:
                msg = (
                    "optimizer.zero_grad() was called after loss.backward() but before "
                    "optimizer.step() or optimizer.synchronize()"
                )
                raise AssertionError(msg)
            self._gradients.reset()
        self._is_synchronized = False
        super().zero_grad(set_to_none=set_to_none)  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and begin a new step."""
        if self._gradients is not None:
            self._gradients.reset()
        self._is_synchronized = False
        super().load_state_dict(state_dict)  # type: ignore[misc]

    def _wrapped(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        if closure is None or self._gradients is None:
            return closure
        gradients = self._gradients

        def combined() -> Any:
            gradients.reset()
            loss = closure()
            if self._should_synchronize:
                gradients.finish()
            return loss

        return combined


def DistributedOptimizer(  # noqa: N802  Horovod's name
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] | Remembering = Compression.none,
    backward_passes_per_step: int = 1,
    op: Op = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return an optimizer of the user's class whose gradients are combined over the ranks.

    Args:
        optimizer: its options are taken over, and its parameters; not its state.
        named_parameters: of the model, all that the optimizer has.
        compression: what gradients travel as; int8, int4, sign, topk(ratio) and powersgd(rank)
            are dtkit's own, and let sparse gradients travel as dense ones.
        backward_passes_per_step: passes whose gradients are summed, not averaged.
        op: Average, Sum, or Adasum, which combines what the steps would change.
        gradient_predivide_factor: divides before the sum, and multiplies after.
        num_groups: into how many groups gradients are put that travel together.
        groups: the same, or the groups themselves; without, groups are of equal size.
        sparse_as_dense: let sparse gradients travel as dense ones.
        process_set: the ranks; others keep a plain optimizer.

    Raises:
        ValueError: names are missing, double or no strings, or a number is out of range.
    """
    if gradient_predivide_factor != 1.0 and op is not Op.AVERAGE:
        msg = "gradient_predivide_factor needs op=hvd.Average"
        raise ValueError(msg)
    if isinstance(compression, Remembering) and op not in (Op.AVERAGE, Op.SUM):
        msg = "this compression averages: it goes with op=hvd.Average or hvd.Sum"
        raise ValueError(msg)
    named = _names(optimizer, named_parameters)
    made = _same_class(optimizer, DeltaMixin if op is Op.ADASUM and size() > 1 else None)
    stand_back([p for _, p in named])
    how = HowToReduce(
        op=op,
        compression=compression,
        scales=(1.0 / gradient_predivide_factor, gradient_predivide_factor),
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    passes = _checked_passes(backward_passes_per_step)
    if isinstance(made, DeltaMixin):
        made.prepare(named, how, passes)
        return made
    gradients = None
    if size() > 1 and process_set.included():
        active = [(name, p) for name, p in named if p.requires_grad]
        buckets = buckets_of(active, num_groups if groups is None else groups)
        gradients = Gradients(buckets, how, passes)
    made.prepare(named, gradients, passes)
    return made


def _checked_passes(passes: int) -> int:
    if passes <= 0:
        msg = f"backward_passes_per_step={passes}: it must be at least 1"
        raise ValueError(msg)
    return passes


def _same_class(optimizer: Optimizer, delta: type | None) -> Any:
    """Return an optimizer of a subclass of the same name, with the same options and no state."""
    kind = type(optimizer)
    bases = (delta or DistributedMixin, kind)
    made: Any = object.__new__(type(kind.__name__, bases, {"__module__": kind.__module__}))
    made.__dict__.update(optimizer.__dict__)
    made.state = defaultdict(dict)
    made.param_groups = list(optimizer.param_groups)
    made.__dict__.pop("step", None)  # a scheduler's wrapper around the other's
    made._patch_step_function()  # noqa: SLF001  so that step hooks see it
    return made


def _names(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> Named:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return [(f"allreduce.noname.{i}", p) for i, p in enumerate(params)]
    named = list(named_parameters)
    if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in named):  # noqa: PLR2004
        msg = "named_parameters is to yield tuples of name and parameter: model.named_parameters()"
        raise ValueError(msg)
    names = [name for name, _ in named]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        msg = f"named_parameters has these names twice: {', '.join(double)}"
        raise ValueError(msg)
    by_id = {id(p): name for name, p in named}
    num_missing = sum(id(p) not in by_id for p in params)
    if num_missing:
        msg = f"named_parameters lacks {num_missing} of the optimizer's parameters"
        raise ValueError(msg)
    return [(by_id[id(p)], p) for p in params]
