"""The graph of the model that a cell trains, for TensorBoard: traced once, after the first step."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine.models import already_distributed
from dtkit.engine.parts import Part
from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]

# Any, below: what a model is called with, and what it returns.


class ModelGraph(Part):
    """Sees how the largest model is called, and writes its graph on the first rank.

    Args:
        run: the run.
    """

    def __init__(self, run: ActiveRun) -> None:
        self._path: Path = run.dir / "graph.pb"
        self._note = run.note
        self._stack = ExitStack()
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._num_values = 0
        self._is_inside = False

    def begin(self) -> None:
        """Look at the calls of models."""
        self._stack.enter_context(replaced(nn.Module, "__call__", self._seeing))

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's signature
        """Write the graph after the first step, when everything that is lazy has its shape."""
        self._stack.close()
        call, self._call = self._call, None
        if call is None:
            return
        try:
            temporary = self._path.with_suffix(".tmp")  # the driver may look at any time
            temporary.write_bytes(_graph_of(*call))
            temporary.replace(self._path)
        except Exception as error:  # noqa: BLE001  not every model can be traced: the run goes on
            reason = str(error).strip().partition("\n")[0]
            self._note(f"no model graph: {type(error).__name__}: {reason}")

    def end(self, state: str) -> None:  # noqa: ARG002  a Part's signature
        """Look no more."""
        self._stack.close()
        self._call = None

    def _seeing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if self._is_inside or not torch.is_grad_enabled():
                return original(module, *args, **kwargs)
            self._is_inside = True
            try:
                result = original(module, *args, **kwargs)
            finally:
                self._is_inside = False
            num_values = sum(p.numel() for p in module.parameters() if p.requires_grad)
            if num_values > self._num_values:
                self._num_values, self._call = num_values, (module, args, kwargs)
            return result

        return __call__


class _Call(nn.Module):
    """A model with one way to call it; its inputs are the tensors among the arguments."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._arguments = [*enumerate(args), *kwargs.items()]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return tuple(value for _, value in self._arguments if isinstance(value, torch.Tensor))

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        arguments = [
            (key, next(given) if isinstance(value, torch.Tensor) else value)
            for key, value in self._arguments
        ]
        args = [value for key, value in arguments if isinstance(key, int)]
        kwargs = {key: value for key, value in arguments if isinstance(key, str)}
        return self.model(*args, **kwargs)


def _graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return TensorFlow's GraphDef of a model, serialised; the model stays as it is."""
    from torch.utils.tensorboard._pytorch_graph import graph

    if isinstance(model, DistributedDataParallel):
        model = model.module  # a forward pass of DDP's own may wait for other ranks
    whose = already_distributed(list(model.parameters()), [model])
    if whose is not None:
        msg = f"{whose}: one rank alone cannot run it"
        raise RuntimeError(msg)
    named = type(type(model).__name__, (_Call,), {})  # as the graph is to be called
    call = named(model, args, kwargs)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=set(devices)),
        _unfused(),
        _same_modes(model),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(None),
    ):
        made, _ = graph(call, call.inputs(), use_strict_trace=False)
    serialized: bytes = made.SerializeToString()
    return serialized


@contextmanager
def _unfused() -> Iterator[None]:
    """Show attention as it trains, and not as the one operator that it is in evaluation."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    """Give each module back the mode that it has now: parts of a model may be in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def make(run: ActiveRun) -> Part:
    """Return the part for a run: on all ranks but the first one that does nothing."""
    return ModelGraph(run) if run.rank == min(run.ranks) else Part()
