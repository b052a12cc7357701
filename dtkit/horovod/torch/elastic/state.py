"""What elastic training keeps: saved by `commit`, equal on all ranks after `sync`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from dtkit.horovod.torch.elastic.sampler import ElasticSampler
from dtkit.horovod.torch.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ObjectState", "State", "TorchState"]

# Any: the user's own values.


class State:
    """Base of states; subclasses know how to save, restore and sync."""

    def __init__(self) -> None:
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], None]]) -> None:
        """Call these when the ranks have changed, such as to set a learning rate anew."""
        self._reset_callbacks += callbacks

    def on_reset(self) -> None:
        """Take note that the ranks have changed."""
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def commit(self) -> None:
        """Save, as where to go on after ranks are lost."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Do nothing: the hosts of a job do not grow while it runs."""

    def save(self) -> None:
        """Save in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was saved last."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take over rank 0's values."""
        raise NotImplementedError

    def reset(self) -> None:
        """Adapt to the ranks there are."""


class ObjectState(State):
    """Values that can be pickled, as attributes.

    Args:
        values: their names and first values.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self._names = tuple(values)
        for name, value in values.items():
            setattr(self, name, value)
        self._saved: dict[str, Any] = {}
        self.save()

    def save(self) -> None:
        """Save copies."""
        self._saved = {name: copy.deepcopy(getattr(self, name)) for name in self._names}

    def restore(self) -> None:
        """Set the values to copies of what was saved."""
        for name, value in self._saved.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        """Set the values to rank 0's, and save them."""
        values = {name: getattr(self, name) for name in self._names}
        for name, value in broadcast_object(values, 0, "elastic.values").items():
            setattr(self, name, value)
        self.save()


class TorchState(ObjectState):
    """A model, an optimizer and samplers beside other values.

    Args:
        model: its parameters and buffers are kept.
        optimizer: its state is kept.
        values: more models, optimizers, `ElasticSampler`s and plain values, by name.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **values: Any,
    ) -> None:
        given = {"model": model, "optimizer": optimizer, **values}
        kinds = (torch.nn.Module, torch.optim.Optimizer, ElasticSampler)
        self._parts = {k: v for k, v in given.items() if isinstance(v, kinds)}
        self._saved_parts: dict[str, Any] = {}
        for name, part in self._parts.items():
            setattr(self, name, part)
        super().__init__(**{k: v for k, v in values.items() if k not in self._parts})

    def save(self) -> None:
        """Save copies of everything."""
        super().save()
        self._saved_parts = {k: copy.deepcopy(p.state_dict()) for k, p in self._parts.items()}

    def restore(self) -> None:
        """Go back to what was saved."""
        super().restore()
        for name, saved in self._saved_parts.items():
            self._parts[name].load_state_dict(copy.deepcopy(saved))

    def sync(self) -> None:
        """Take over rank 0's state; of samplers, what any rank has processed counts."""
        for name, part in self._parts.items():
            if isinstance(part, torch.nn.Module):
                broadcast_parameters(part.state_dict(), 0, f"elastic.{name}.")
            elif isinstance(part, ElasticSampler):
                self._sync_sampler(name, part)
            else:
                broadcast_optimizer_state(part, 0)
                part.zero_grad()
        super().sync()

    def reset(self) -> None:
        """Divide what is left among the ranks there are."""
        for part in self._parts.values():
            if isinstance(part, ElasticSampler):
                part.reset()

    def _sync_sampler(self, name: str, sampler: ElasticSampler) -> None:
        states = allgather_object(sampler.state_dict(), f"elastic.{name}")
        processed = set().union(*(state["processed_indices"] for state in states))
        sampler.load_state_dict({"epoch": states[0]["epoch"], "processed_indices": processed})
