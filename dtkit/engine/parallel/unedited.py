"""`--strategy shard`, `hybrid:N`: the models of an unedited cell are sharded when adopted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.engine.models import already_distributed, find_models
from dtkit.engine.parallel.layout import layout_of
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from dtkit.strategy import Strategy

__all__ = ["Sharder", "sharder_of"]


class Sharder:
    """Shards the models of optimizers.

    Args:
        strategy: over how many ranks.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def prepare(self, params: Sequence[torch.Tensor], *, has_trained: bool) -> None:
        """Shard the models that hold these parameters, as far as nobody has laid them out.

        Args:
            params: of an optimizer, which goes on with what takes their places.
            has_trained: whether a forward pass may be under way with them.

        Raises:
            InvalidInputError: it is too late.
        """
        models = [
            model
            for model in find_models(params)
            if layout_of([model]) is None and not already_distributed(params, [model])
        ]
        if models and has_trained:
            names = ", ".join(type(model).__name__ for model in models)
            msg = (
                f"--strategy {self._strategy}: the optimizer of {names} was first seen after a "
                "forward pass, when it is too late to shard the model. Make it in this cell, "
                "before the loop, or name it in the cell"
            )
            raise InvalidInputError(msg)
        from dtkit.engine.parallel.sharding import shard  # it loads FSDP, which takes a second

        number = self._strategy.value
        for model in models:
            shard(model, num_shards=None if number is None else int(number))


def sharder_of(strategy: Strategy) -> Sharder | None:
    """Return what shards models for a strategy, None if it leaves them whole."""
    return Sharder(strategy) if strategy.name in ("shard", "hybrid") else None
