"""`dtkit.pipeline`: the layers of a model over the ranks, a batch in micro-batches through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn

from dtkit.engine import randomness
from dtkit.engine.observe import unseen
from dtkit.engine.parallel import schedules
from dtkit.engine.parallel.cutting import cut, measured_s, sizes
from dtkit.engine.parallel.delivery import deliver
from dtkit.engine.parallel.layout import Layout, group_here, mark
from dtkit.engine.parallel.meshes import device_here, make_mesh
from dtkit.engine.parallel.report import cut_summary, say
from dtkit.engine.parallel.stages import Stage, keep_only
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Pipeline", "pipeline"]

# Any, below: torch's schedules, and what a loss function takes.


class Pipeline:
    """A model whose layers are on several ranks.

    `loss = pipe(inputs, target)` sends a batch through, forward and backward, and returns the
    loss, on every rank. `loss.backward()` gives this rank's parameters their gradients; so
    the loop around it, clipping included, is that of one device. Every rank of a pipeline
    must be given the same batch; the first uses the inputs and the last the target.

    Attributes:
        model: the model, with the layers of other ranks on the meta device.
        layout: which rank has what.
    """

    dtkit_model = True
    """What is pulled is `model`, whole."""

    def __init__(
        self, model: nn.Sequential, loss_fn: Callable[..., torch.Tensor], layout: Layout,
        ranges: Sequence[range], order: tuple[str, int],
    ) -> None:  # fmt: skip
        self.model = model
        self.layout = layout
        self._loss_fn = loss_fn
        self._schedule_name, self._num_microbatches = order
        self._num_stages = len(ranges)
        self._rank = layout.part
        self._num_ranks = layout.num_holders
        self._stages = {
            number: Stage([model[i] for i in layers])
            for number, layers in enumerate(ranges)
            if number % self._num_ranks == self._rank
        }
        self._schedules: dict[Any, Any] = {}

    def __call__(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch; without gradients under `torch.no_grad()`."""
        losses: list[torch.Tensor] = []
        is_training = torch.is_grad_enabled()
        schedule = self._schedule(inputs, loss_fn=self._loss_fn, is_training=is_training)
        given = {"target": target, "losses": losses} if self._has_last else {}
        with unseen():
            run = schedule.step if is_training else schedule.eval
            run(*self._first(inputs), **given)
        loss = (
            torch.stack([value.detach() for value in losses]).mean() if losses else torch.zeros(())
        )
        loss = loss.to(device_here(), torch.float32)
        dist.broadcast(loss, group=self.layout.holders, group_src=self._last_rank)
        if not is_training:
            return loss
        return deliver(loss, [pair for stage in self._stages.values() for pair in stage.grads()])

    @torch.no_grad()
    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the model's outputs for a batch, on every rank."""
        schedule = self._schedule(inputs, loss_fn=None, is_training=False)
        found = schedule.eval(*self._first(inputs))
        about: list[Any] = [(found.shape, found.dtype) if self._has_last else None]
        dist.broadcast_object_list(about, group=self.layout.holders, group_src=self._last_rank)
        shape, dtype = about[0]
        output = found.contiguous() if self._has_last else torch.empty(shape, dtype=dtype)
        output = output.to(device_here())
        dist.broadcast(output, group=self.layout.holders, group_src=self._last_rank)
        return output

    def retire(self) -> None:
        """Let go of the process group; `layout` says so from then on."""
        self._schedules.clear()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are on this rank, for its optimizer."""
        return (param for _, param in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield them with the names that they have in the model."""
        return ((n, p) for n, p in self.model.named_parameters() if not p.is_meta)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what is on this rank, under its names in the model."""
        return {n: t for n, t in self.model.state_dict().items() if not t.is_meta}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what is on this rank from the state of the whole model, or of this rank's part."""
        wanted = self.state_dict()
        self.model.load_state_dict({n: state[n] for n in wanted}, strict=False)

    def train(self, mode: bool = True) -> Pipeline:  # noqa: FBT001, FBT002  as torch's modules have it
        """Set training mode, or evaluation."""
        self.model.train(mode)
        return self

    def eval(self) -> Pipeline:
        """Set evaluation."""
        return self.train(False)

    @property
    def _has_last(self) -> bool:
        return self._rank == self._last_rank

    @property
    def _last_rank(self) -> int:
        return (self._num_stages - 1) % self._num_ranks

    def _first(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (inputs,) if self._rank == 0 else ()

    def _schedule(
        self, inputs: torch.Tensor, *, loss_fn: Callable[..., Any] | None, is_training: bool
    ) -> Any:
        """Return the schedule for a batch of this shape, ready for a step."""
        self.layout.before_use()
        for stage in self._stages.values():
            stage.begin()
        key = (inputs.shape, inputs.dtype, loss_fn is None, is_training)
        if key not in self._schedules:
            from torch.distributed.pipelining import PipelineStage  # it loads torch's compiler

            num, name = self._num_microbatches, self._schedule_name
            if len(inputs) % num:  # the end of the data: fewer micro-batches, of one size
                num = next(n for n in range(num, 0, -1) if len(inputs) % n == 0)
                name = ""
            stages = [
                PipelineStage(
                    stage.twin, number, self._num_stages, device_here(), group=self.layout.holders
                )
                for number, stage in self._stages.items()
            ]
            self._schedules[key] = schedules.make_schedule(name, stages, num, loss_fn)
        return self._schedules[key]


def pipeline(
    model: nn.Sequential | Sequence[nn.Module],
    loss_fn: Callable[..., torch.Tensor],
    *,
    num_stages: int | None = None,
    num_ranks: int | None = None,
    schedule: str = "1f1b",
    num_microbatches: int | None = None,
    example: torch.Tensor | None = None,
) -> Pipeline:
    """Cut a row of layers into stages over the ranks; call it on all ranks.

    Args:
        model: an `nn.Sequential`, or a list of layers; each takes what the one before returns.
        loss_fn: takes outputs and targets of a micro-batch, and returns the mean loss.
        num_stages: how many stages; None: one on each rank, two under `interleaved` and
            `zero-bubble`.
        num_ranks: over how many ranks; None: all. Fewer make copies of the pipeline, which
            train on different data.
        schedule: `gpipe`, `1f1b`, `interleaved` or `zero-bubble`.
        num_microbatches: into how many a batch is divided; None: twice as many as stages.
        example: a batch of inputs. Then the cuts are made by measured time, else by the
            number of parameters.

    Raises:
        InvalidInputError: that cannot be done with this many ranks, layers or micro-batches.
    """
    group = group_here("dtkit.pipeline")
    world_size = dist.get_world_size(group)
    width = num_ranks or world_size
    whole = _in_a_row(model)
    layers = list(whole)
    wanted = num_stages or width * schedules.stages_per_rank(schedule)
    microbatches = num_microbatches or 2 * wanted
    has_params = [any(True for _ in layer.parameters()) for layer in layers]
    _check_ranks(world_size, width, wanted, sum(has_params))
    schedules.check(schedule, wanted, width, microbatches)
    costs = _costs(layers, example, group)
    ranges = cut(costs, has_params, wanted)
    text = cut_summary(layers, ranges, costs, width, is_measured=example is not None)
    mesh = make_mesh(group, (world_size // width, width), ("data", "pipe"))
    row, part = divmod(dist.get_rank(group), width)
    mine = {i for number, r in enumerate(ranges) if number % width == part for i in r}
    randomness.share(group)
    keep_only(layers, mine, group, device_here())
    layout = Layout("pipelined", mesh, row, world_size // width, width, False, ref(group))
    mark(whole, layout)
    say(group, f"{text}; {schedule}, {microbatches} micro-batches")
    return Pipeline(whole, loss_fn, layout, ranges, (schedule, microbatches))


def _in_a_row(model: object) -> nn.Sequential:
    """Return a model, or a list of layers, as layers that follow each other."""
    if not isinstance(model, Iterable):
        msg = (
            f"dtkit.pipeline: {type(model).__name__} is neither an nn.Sequential nor a list of "
            "layers: name its layers, each of which takes what the one before returns"
        )
        raise InvalidInputError(msg)
    return model if isinstance(model, nn.Sequential) else nn.Sequential(*model)


def _check_ranks(world_size: int, width: int, num_stages: int, num_layers: int) -> None:
    msg = ""
    if width < 2 or world_size % width:  # noqa: PLR2004  a pipeline
        msg = f"dtkit.pipeline(num_ranks={width}): 2 or more, and a divisor of {world_size} ranks"
    elif num_layers < num_stages or num_stages % width:
        msg = (
            f"dtkit.pipeline: {num_layers} layers with parameters, {num_stages} stages, {width} "
            "ranks: as many such layers as stages or more, and as many stages on each rank"
        )
    if msg:
        raise InvalidInputError(msg)


def _costs(
    layers: list[nn.Module], example: torch.Tensor | None, group: dist.ProcessGroup
) -> list[float]:
    """Return what the layers cost, the same on all ranks."""
    found: list[Any] = [None]
    if dist.get_rank(group) == 0:
        is_measured = example is not None and not any(
            p.is_meta for layer in layers for p in layer.parameters()
        )
        found = [
            measured_s(layers, example) if is_measured and example is not None else sizes(layers)
        ]
    dist.broadcast_object_list(found, group=group, group_src=0, device=torch.device("cpu"))
    return list(found[0])
