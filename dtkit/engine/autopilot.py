"""The plain cell made data parallel: what it trains is shared, what it reads is divided.

An optimizer is adopted when the cell makes it, or first uses one that an
earlier cell made: its models get rank 0's weights, and from then on its
gradients are averaged inside `backward()`. Whoever distributed a model himself
(DDP, FSDP, DTensor, hvd) is left to it.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtkit.engine import randomness, saving
from dtkit.engine.adoption import Adoption
from dtkit.engine.ddp import UsersDdp
from dtkit.engine.loader import ShardedLoaders, why_whole
from dtkit.engine.mean import mean_over, sharing_metric
from dtkit.engine.models import already_distributed, named_in, optimizers_used, uses_distributed
from dtkit.engine.parallel.layout import layout_of
from dtkit.engine.patches import replaced
from dtkit.engine.reduce import Passes
from dtkit.engine.saying import what_was_done

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.utils.data import DataLoader

    from dtkit.engine.drawn import Drawn
    from dtkit.engine.loader import Shares
    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.parallel.unedited import Sharder
    from dtkit.engine.reduce import Wire

__all__ = ["Autopilot"]

# Any, below: losses, closures and patched functions are the user's or torch's own.


class Autopilot:
    """Distributes an unedited single-device cell over a group of ranks.

    Args:
        wire: the ranks, two or more, and how gradients travel between them.
        is_global_batch: whether a written batch size is that of all ranks together.
        note: takes a line for the user.
        on_wait: called with the seconds spent waiting for other ranks' gradients.
        on_layout: called with a model's layout, if several ranks hold it together.
        is_deferred: whether gradients are averaged when they are used, not in `backward()`.
        sharder: shards the cell's models; None: they are whole, or the cell shards them.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        is_global_batch: bool,
        note: Callable[[str], None],
        on_wait: Callable[[float], None],
        on_layout: Callable[[Layout], None],
        is_deferred: bool = False,
        sharder: Sharder | None = None,
    ) -> None:
        self._wire = wire
        self._group = group = wire.group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._is_global_batch = is_global_batch
        self._note = note
        self._shards = sharder is not None
        self._on_layout = on_layout
        self._passes = Passes(on_wait, is_deferred=is_deferred)
        self._ddp = UsersDdp(wire, self.stand_back, note, is_deferred=is_deferred)
        self.adoption: Adoption = Adoption(wire, self._passes, note, self.arrange, sharder)
        self._loaders = ShardedLoaders(group, is_global=is_global_batch)
        self._is_users = False
        """Whether the cell distributes its model itself."""
        self._has_noted_whole = self._has_noted_weights = False
        self.layout: Layout | None = None
        """Of the model, if several ranks hold it together."""
        self.batch_weight: float = 1.0
        """What this rank's gradient weighs in the global batch."""

    @property
    def first_rank(self) -> int:
        """The rank that speaks for all, as a rank of the whole group."""
        return dist.get_global_rank(self._group, 0)

    def prepare(self, source: str, namespace: Mapping[str, Any]) -> None:
        """Let all ranks begin a cell alike: random numbers, and weights that are there."""
        randomness.share(self._group)
        self._ddp.found()
        named = named_in(source, namespace)
        layout = layout_of(named)
        if layout is not None:
            self.arrange(layout)
        is_wrapped = layout is None and already_distributed([], named) is not None
        self._is_users = is_wrapped or uses_distributed(source, namespace)
        # type(), not isinstance: an arbitrary object's __class__ may run code.
        found = {id(v): v for v in namespace.values() if issubclass(type(v), Optimizer)}
        self.adoption.equalize(found.values())
        if self._shards and not self._is_users:
            for optimizer in optimizers_used(source, namespace):
                self.adoption.adopt(optimizer)

    def arrange(self, layout: Layout) -> None:
        """Divide the data among those who have not the same model's parts."""
        if self.layout is not None:
            layout.check_beside(self.layout)
        self.layout = layout
        self._on_layout(layout)
        self._loaders.divide(layout.data_rank, layout.num_data)

    def adopt(self, optimizer: Optimizer) -> None:
        """Take over an optimizer that the cell has made."""
        self.adoption.adopt(optimizer)

    def stand_back(self, params: Iterable[torch.Tensor], reason: str) -> None:
        """Leave parameters, and the cell's DataLoaders, to whoever distributes them already."""
        self._is_users = True
        self.adoption.release(params, reason)

    def settle(self, optimizers: Iterable[Optimizer]) -> None:
        """Make weights equal now that the cell has set them, and not at their first use.

        By then a forward pass has changed running statistics on each rank, and the
        first rank's would replace the others'.
        """
        for optimizer in optimizers:
            self.adoption.adopt(optimizer)
        self.adoption.before_first_use()

    def before_backward(self) -> float:
        """Make ready for a backward pass; returns the weight of its gradients."""
        self.adoption.before_first_use()
        if not self._passes.num_begun and not self._is_global_batch:
            self._part()
        self._passes.begin()
        return self.batch_weight

    def weigh(self, weight: float, *, is_another: bool) -> None:
        """Take the weight of the next backward pass.

        Args:
            weight: of this rank's share of a batch.
            is_another: whether a batch for the same pass has been weighed already.
        """
        if is_another and weight != self.batch_weight and not self._has_noted_weights:
            self._has_noted_weights = True
            self._note(
                "unequal shares of two batches met in one backward pass: the last one counts"
            )
        self.batch_weight = weight

    def after_backward(self, *, has_failed: bool) -> None:
        """Make the gradients final that are due."""
        if has_failed:
            self._passes.abort()
        else:
            self._passes.end()

    def average(self, optimizer: Optimizer) -> None:
        """Average what is not averaged yet of an optimizer's gradients: they are used now."""
        self.adoption.before_use(optimizer)

    def follow_scale(self, scale: Callable[[], float]) -> None:
        """Keep what compression remembers in step with the scale of the losses."""
        self.adoption.follow_scale(scale)

    def before_step(self, optimizer: Optimizer) -> None:
        """Make ready for a step: it must see equal gradients everywhere."""
        self.adoption.before_step(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """Note a finished step."""
        self.adoption.used(optimizer)
        if self.layout is not None:
            self.layout.num_steps += 1

    def before_clipping(self, grads: Iterable[torch.Tensor]) -> None:
        """Average what is not averaged yet: clipping looks at all gradients together."""
        self.adoption.flush(grads)

    def shared_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure with its loss averaged over ranks.

        Optimizers such as LBFGS decide by the loss; ranks that saw different
        losses would take different decisions and part.
        """
        if self._wire.strategy.is_loose:
            return closure

        def averaged() -> Any:
            loss = closure()
            # The optimizer uses the gradients now, long before its step is done.
            self.adoption.before_use(optimizer)
            self.adoption.used(optimizer)
            return mean_over(self._group, loss, self.batch_weight)

        return averaged

    def twin(self, loader: DataLoader[Any]) -> DataLoader[Any] | None:
        """Return the loader that yields this rank's share, None to leave `loader` whole."""
        return None if self._is_left_whole else self._loaders.twin(loader)

    def deal(self, make_shares: Callable[[Any, int], Shares]) -> None:
        """Divide loaders as `make_shares` does, see `ShardedLoaders`, and not evenly."""
        self._loaders.make_shares = make_shares

    def drawn(self) -> Mapping[DataLoader[Any], Drawn]:
        """Return what each divided loader's newest pass drew on this rank."""
        return self._loaders.drawn()

    def is_evaluating(self) -> bool:
        """Return whether the cell evaluates: that must see every sample."""
        models = self.adoption.models
        is_eval = models and not any(m.training for model in models for m in model.modules())
        return bool(is_eval) or not torch.is_grad_enabled()

    def trained_on_whole(self, loader: DataLoader[Any]) -> None:
        """Tell the user that a loader trains although it was not divided."""
        reason = why_whole(loader)
        if reason is None:
            reason = (
                "the cell distributes its model itself"
                if self._is_left_whole
                else "the model was in eval mode"
            )
        if reason:
            self._has_noted_whole = True
            self._note(f"1 DataLoader left whole: {reason}")

    @contextmanager
    def flying(self) -> Iterator[None]:
        """Keep watch within the context; on leaving, every hook is removed."""
        has_own = lambda: self._is_left_whole or self._wire.strategy.is_free  # noqa: E731
        sharing = partial(sharing_metric, self._group, has_own)
        with ExitStack() as stack:
            stack.callback(self.adoption.close)
            stack.callback(self._ddp.close)
            for owner, name, make in (
                (DistributedDataParallel, "__init__", self._ddp.making),
                (ReduceLROnPlateau, "step", sharing),
                (torch, "save", saving.whole_or_not_at_all),
            ):
                stack.enter_context(replaced(owner, name, make))
            yield

    def summary(self) -> str:
        """Return one line that says what was done to the cell."""
        return what_was_done(
            self.adoption, self._loaders, self._wire, layout=self.layout,
            has_passes=self._passes.num_begun > 0, has_noted_whole=self._has_noted_whole,
        )  # fmt: skip

    def compare_weights(self, optimizer: Optimizer, store: dist.Store, name: str) -> str | None:
        """Return a line if an optimizer's weights are not the same on all ranks.

        Nobody waits: each rank leaves its checksum in the store, and the one that
        comes last compares. If a rank never comes, nothing is compared.

        Args:
            optimizer: whose parameters.
            store: shared by the ranks.
            name: of the run, used once.
        """
        checksum = self.adoption.checksum(optimizer)
        if checksum is None:
            return None
        store.set(f"{name}/{self._rank}", checksum)
        if store.add(f"{name}/count", 1) < self._world_size:
            return None
        found = {store.get(f"{name}/{rank}") for rank in range(self._world_size)}
        if len(found) == 1:
            return None
        return (
            "the ranks ended with different weights: something that the cell did differed from "
            "rank to rank. Rank 0's are the ones that %dist_pull brings"
        )

    @property
    def _is_left_whole(self) -> bool:
        return self._is_users or self.adoption.num_left_alone > 0

    def _part(self) -> None:
        first = torch.tensor(list(randomness.fingerprint()), dtype=torch.uint8)
        self._wire.spread([first])
        randomness.part(self._loaders.rank, bytes(first.tolist()))
