"""The plain cell made data parallel: what it trains is shared, what it reads is divided.

An optimizer is adopted when the cell makes it, or first uses one that an
earlier cell made: its models get rank 0's weights, and from then on its
gradients are averaged inside `backward()`. Whoever distributed a model himself
(DDP, FSDP, DTensor, hvd) is left to it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine.loader import ShardedLoaders
from dtkit.engine.models import (
    already_distributed,
    find_models,
    running_statistics,
    sparse_parameters,
)
from dtkit.engine.patches import replaced
from dtkit.engine.reduce import GradSynchronizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

__all__ = ["Autopilot"]


class _Adopted:
    """One optimizer, with the synchronizers of its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.synchronizers: list[GradSynchronizer] = []
        self.num_params = 0
        self.frozen: list[torch.nn.Parameter] = []
        self.is_used = False
        self.is_left_alone = False

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Autopilot:
    """Distributes an unedited single-device cell over a group of ranks.

    Args:
        group: the ranks; two or more.
        is_global_batch: whether a written batch size is that of all ranks together.
        note: takes a line for the user.
        on_wait: called with the seconds spent waiting for other ranks' gradients.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        is_global_batch: bool,
        note: Callable[[str], None],
        on_wait: Callable[[float], None],
    ) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._is_global_batch = is_global_batch
        self._note = note
        self._on_wait = on_wait
        self._adopted: dict[int, _Adopted] = {}
        self._owned: set[int] = set()
        self._models: set[int] = set()
        self._has_own_seed = False
        self.loaders = ShardedLoaders(group, is_global=is_global_batch, note=note)
        self.batch_weight = 1.0

    def adopt(self, optimizer: Optimizer) -> None:
        """Take over an optimizer's parameters, unless somebody distributes them already."""
        if id(optimizer) in self._adopted:
            return
        entry = self._adopted[id(optimizer)] = _Adopted(optimizer)
        self._take(entry)
        self._differ_in_seed()

    def use(self, optimizer: Optimizer) -> _Adopted:
        """Note a use of the optimizer; at the first one its models are made equal again.

        Between its making and its first use the cell may have initialised or
        loaded weights.
        """
        if id(optimizer) not in self._adopted:
            self.adopt(optimizer)
            self._adopted[id(optimizer)].is_used = True
        entry = self._adopted[id(optimizer)]
        if not entry.is_used:
            entry.is_used = True
            if not entry.is_left_alone:
                self._broadcast(find_models(entry.parameters()), entry.parameters())
        return entry

    def before_backward(self) -> None:
        """Make sure that every optimizer made so far is in use."""
        for entry in list(self._adopted.values()):
            if not entry.is_used:
                self.use(entry.optimizer)

    def zeroed(self, optimizer: Optimizer) -> None:
        """Note that the optimizer's gradients are cleared."""
        for synchronizer in self.use(optimizer).synchronizers:
            synchronizer.zeroed()

    def before_step(self, optimizer: Optimizer) -> None:
        """Average what is not averaged yet: the step must see equal gradients everywhere."""
        entry = self.use(optimizer)
        if entry.is_left_alone:
            return
        num_params = sum(len(group["params"]) for group in optimizer.param_groups)
        if num_params != entry.num_params or any(p.grad is not None for p in entry.frozen):
            self._take(entry)
        for synchronizer in entry.synchronizers:
            synchronizer.flush()

    def after_step(self, optimizer: Optimizer) -> None:
        """Note a finished step."""
        for synchronizer in self._adopted[id(optimizer)].synchronizers:
            synchronizer.stepped()

    def flush(self) -> None:
        """Average whatever is not averaged yet, before gradients are clipped or unscaled."""
        for entry in self._adopted.values():
            for synchronizer in entry.synchronizers:
                synchronizer.flush()

    def shared_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure with its loss averaged over ranks.

        Optimizers such as LBFGS decide by the loss; ranks that saw different
        losses would take different decisions and part.
        """

        def averaged() -> Any:
            loss = closure()
            if not isinstance(loss, torch.Tensor):
                return loss
            total = loss.detach().clone() * self.batch_weight
            dist.all_reduce(total, group=self._group)
            return total / self._world_size

        return averaged

    @contextmanager
    def flying(self) -> Iterator[None]:
        """Keep watch within the context; on leaving, every hook is removed."""
        with ExitStack() as stack:
            stack.callback(self._release_all)
            stack.enter_context(
                replaced(DistributedDataParallel, "__init__", self._standing_back_for_ddp)
            )
            if self._rank:
                stack.enter_context(replaced(torch, "save", self._saving_on_rank_0))
            yield

    def summary(self) -> str:
        """Return one line that says what was done to the cell."""
        averaged = [e for e in self._adopted.values() if e.synchronizers]
        parts = []
        if self._models:
            parts.append(f"{_count(len(self._models), 'model')} broadcast")
        for size in sorted({s for s in self.loaders.batch_sizes if s}):
            num = self.loaders.batch_sizes.count(size)
            parts.append(f"{_count(num, 'DataLoader')} sharded ({self._batch_text(size)})")
        if averaged:
            parts.append("gradients averaged")
            if not self.loaders.batch_sizes:
                parts.append(
                    "no DataLoader was sharded: every rank trains on the data that it reads itself"
                )
        return ", ".join(parts)

    def _batch_text(self, size: int) -> str:
        num = self._world_size
        if self._is_global_batch:
            return f"global batch {size} = {num} × {size / num:g}"
        return f"global batch {num} × {size} = {num * size}"

    def _take(self, entry: _Adopted) -> None:
        """Adopt the entry's parameters that are not adopted yet."""
        params = [p for p in entry.parameters() if p.is_leaf]
        entry.num_params = len(entry.parameters())
        entry.frozen = [p for p in params if not p.requires_grad]
        fresh = [p for p in params if p.requires_grad and id(p) not in self._owned]
        if not fresh:
            return
        models = find_models(fresh)
        reason = already_distributed(fresh, models) or self._disagreement(fresh)
        if getattr(entry.optimizer, "_dtkit_distributed", False):
            reason = "it averages gradients itself"
        if reason:
            entry.is_left_alone = True
            self._note(f"{type(entry.optimizer).__name__} left alone: {reason}")
            return
        self._broadcast(models, entry.parameters())
        self._models.update(id(m) for m in models)
        self._owned.update(id(p) for p in fresh)
        entry.synchronizers.append(
            GradSynchronizer(
                fresh,
                self._group,
                sparse=[p for p in sparse_parameters(models) if p.requires_grad],
                tensors=lambda: running_statistics(models),
                on_wait=self._on_wait,
            )
        )

    def _disagreement(self, params: list[torch.nn.Parameter]) -> str | None:
        """Return why ranks cannot average these: they are not the same everywhere."""
        layout = ";".join(f"{tuple(p.shape)}{p.dtype}" for p in params)
        digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
        bounds = torch.tensor([digest, -digest])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        if int(bounds[0]) == digest == -int(bounds[1]):
            return None
        return "its parameters differ between ranks in number or shape (model parallel?)"

    @torch.no_grad()
    def _broadcast(self, models: list[torch.nn.Module], params: list[torch.nn.Parameter]) -> None:
        tensors = {id(p): p.data for p in params}
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()]:
                tensors.setdefault(id(tensor), tensor.data)
        work = [
            dist.broadcast(t, group=self._group, group_src=0, async_op=True)
            for t in tensors.values()
            if t.numel()
        ]
        for pending in work:
            pending.wait()

    def _differ_in_seed(self) -> None:
        # From here on ranks draw different numbers, so that dropout and
        # augmentation differ. Rank 0 keeps the cell's own stream.
        if self._rank and not self._has_own_seed:
            torch.manual_seed(torch.initial_seed() + self._rank)
        self._has_own_seed = True

    def _standing_back_for_ddp(self, original: Callable[..., None]) -> Callable[..., None]:
        def __init__(ddp: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            self._release({id(p) for p in module.parameters()})
            original(ddp, module, *args, **kwargs)

        return __init__

    def _release(self, params: set[int]) -> None:
        for entry in self._adopted.values():
            if params.intersection(id(p) for p in entry.parameters()):
                for synchronizer in entry.synchronizers:
                    synchronizer.close()
                entry.synchronizers.clear()
                entry.is_left_alone = True

    def _release_all(self) -> None:
        for entry in self._adopted.values():
            for synchronizer in entry.synchronizers:
                synchronizer.close()

    def _saving_on_rank_0(self, original: Callable[..., None]) -> Callable[..., None]:
        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            # Ranks that write the same file at the same time would spoil it.
            if not isinstance(f, str | os.PathLike):
                original(obj, f, *args, **kwargs)

        return save


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"
