"""Layout: which ranks hold one model together, and which of them train on the same data."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import nn

from dtkit.engine.living import alive
from dtkit.engine.process.agent import agent, current_run
from dtkit.errors import InvalidInputError
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from dtkit.recipe import Recipe

__all__ = [
    "MARK",
    "Layout",
    "group_here",
    "laid_out",
    "layout_of",
    "mark",
]

MARK = "_dtkit_layout"
_NUMBERS: WeakKeyDictionary[dist.ProcessGroup, count[int]] = WeakKeyDictionary()


@dataclass(slots=True, eq=False)
class Layout:
    """How the ranks of a group hold one model.

    Attributes:
        kind: what was done to the model: `sharded`, `tensor parallel` or `pipelined`.
        mesh: its last axis has the ranks that hold the model together.
        data_rank: which of the data this rank trains on, and of how many parts.
        num_data: into how many parts the data is divided.
        num_holders: how many ranks train on the same data, each with a part of the model.
        averages: whether torch averages the gradients over the data axis; else dtkit does.
        again: lays a model out again when the mesh has got the groups of another process group;
            None: nothing else is to be done.
        rank: the rank that has this part.
        num_steps: how many steps an optimizer has made with it here.
        number: the same on all of its ranks, and another one for each model of a group.
    """

    kind: str
    mesh: DeviceMesh
    data_rank: int
    num_data: int
    num_holders: int
    averages: bool
    _group: ReferenceType[dist.ProcessGroup]
    # Weakly: what keeps an ended group keeps its connections, which are in the next one's way.
    _world: Callable[[], Any] = field(default_factory=lambda: ref(dist.group.WORLD))
    again: Callable[[nn.Module], None] | None = None
    rank: int = field(default_factory=dist.get_rank)
    num_steps: int = 0
    number: tuple[int, int] = (0, 0)
    _warning: str = ""
    _reason: str = ""

    def __post_init__(self) -> None:
        group = self._group()
        assert group is not None  # noqa: S101  the model was just laid out in it
        # Models are laid out by all ranks of a group together: it is the same number on all.
        self.number = (_generation(), next(_NUMBERS.setdefault(group, count())))

    def __deepcopy__(self, _memo: object) -> Layout:
        return self  # a copy of the model is on the same ranks

    @property
    def group(self) -> dist.ProcessGroup:
        """All of the ranks."""
        self.check()
        group = self._group()
        assert group is not None  # noqa: S101  for the type checker: it is there
        return group

    @property
    def part(self) -> int:
        """Which part of the model this rank holds, of `num_holders`."""
        return dist.get_rank(self._group()) % self.num_holders

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part as this one; None if there are no others."""
        return self.mesh.get_group("data") if self.num_data > 1 else None

    @property
    def holders(self) -> dist.ProcessGroup | None:
        """The ranks that train on the same data; None if there are no others."""
        return self.mesh.get_group(self.mesh.ndim - 1) if self.num_holders > 1 else None

    def to_average(
        self, params: Sequence[torch.Tensor]
    ) -> tuple[dist.ProcessGroup | None, list[torch.Tensor]]:
        """Return over which ranks dtkit has something to average, and which of the parameters."""
        self.check()
        if self.averages:  # running statistics are left to average
            return self.group, []
        return self.data_group, [p for p in params if not p.is_meta]

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise if a flag of the run does not go with this.

        Raises:
            InvalidInputError: one does not.
        """
        if self.averages and recipe.compress != "none":
            msg = (
                f"--compress {recipe.compress}: torch averages the gradients of a model that is "
                f"{self.kind}. dtkit.shard(model, reduce_dtype=torch.bfloat16) halves them"
            )
            raise InvalidInputError(msg)
        if Strategy.parse(recipe.strategy).is_loose:
            msg = (
                f"--strategy {recipe.strategy}: each rank would make steps of its own, and the "
                f"ranks of a model that is {self.kind} make every step together"
            )
            raise InvalidInputError(msg)
        if self.kind == "pipelined" and recipe.amp != "off":
            msg = (
                f"--amp {recipe.amp}: the forward passes of a pipeline are torch's own schedule's; "
                "use torch.autocast within the layers"
            )
            raise InvalidInputError(msg)
        if recipe.amp == "fp16":
            msg = (
                f"--amp fp16: the model is {self.kind}, and a rank that finds an infinite gradient "
                "in its part would skip the step alone. Use --amp bf16"
                f"{', or dtkit.shard(model, param_dtype=torch.bfloat16)' if self.averages else ''}"
            )
            raise InvalidInputError(msg)

    def check_beside(self, other: Layout) -> None:
        """Raise if a model of another layout cannot be trained in the same cell.

        Raises:
            InvalidInputError: their data is divided otherwise.
        """
        if self.num_data != other.num_data:
            msg = (
                f"one model here is {other.kind} and another {self.kind}, with their data divided "
                f"into {other.num_data} and {self.num_data} parts: lay both out alike, or train "
                "one of them in a cell of its own"
            )
            raise InvalidInputError(msg)

    def renew(self, group: dist.ProcessGroup) -> list[int]:
        """Go on in another group of the same ranks, of which the mesh has the groups already.

        Returns:
            How many steps each rank has made with the model.
        """
        self._group, self._world = ref(group), ref(group)
        steps: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(steps, self.num_steps, group=group)
        self.num_steps = max(steps)
        return steps

    def fell_behind(self, ranks: Sequence[int]) -> None:
        """Note whose part lacks a step that others have made, and that nobody else has."""
        if ranks:
            self._warning = (
                f"the model that is {self.kind}: on ranks {', '.join(map(str, ranks))} its parts "
                "lack the step in which a rank failed, which the others have made. Load the newest "
                "checkpoint (dtkit.resume) for one that is of a piece"
            )

    def gave_up(self, reason: str) -> None:
        """Note why the model cannot go on in the group that there is now."""
        self._world = _nothing
        self._reason = f"it could not be laid out in the new one ({reason})"

    def before_use(self) -> None:
        """Raise if the model cannot compute; say once if its parts are not of the same step."""
        self.check()
        if self._warning:
            run, text, self._warning = current_run(), self._warning, ""
            if dist.get_rank() == 0:
                print(text) if run is None else run.note(text)  # noqa: T201  the cell's output

    def check(self) -> None:
        """Raise if the process group that the model was laid out in is gone.

        Raises:
            RuntimeError: it is.
        """
        if self._world() is None or self._world() is not dist.group.WORLD:
            msg = (
                f"this model was {self.kind} in a process group that has ended since, and "
                f"{self._reason or 'not all of its ranks are in the new one'}: make it again, and "
                "load its newest checkpoint with dtkit.resume. Parts that are left are kept: if "
                "copies have the others, %dist_pull brings it whole as it was"
            )
            raise RuntimeError(msg)


def _generation() -> int:
    try:
        group = agent().group
    except RuntimeError:  # a plain process, which has one group for life
        return 0
    return 0 if group is None else group.generation


def _nothing() -> None:
    """Stand in for a reference to a group that is gone."""


def mark(model: nn.Module, layout: Layout) -> None:
    """Let it be known that a model is laid out, to the run that is active too."""
    model.__dict__[MARK] = layout
    run = current_run()
    if run is not None:
        run.arrange(layout)


def laid_out() -> list[nn.Module]:
    """Return the models that are alive and that several ranks hold together."""
    return [model for model in alive(nn.Module) if MARK in vars(model)]


def layout_of(models: Iterable[nn.Module]) -> Layout | None:
    """Return the layout of the first of these models that has one, in it or in a part of it."""
    for model in models:
        for module in model.modules():
            layout = module.__dict__.get(MARK)
            if layout is not None:
                return layout  # type: ignore[no-any-return]  # we put it there
    return None


def group_here(what: str) -> dist.ProcessGroup:
    """Return the ranks that run the present cell.

    Raises:
        InvalidInputError: there is one rank only, or no process group.
    """
    run = current_run()
    group = getattr(run, "group", None) if run is not None else None
    if run is None and dist.is_initialized():
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup) or dist.get_world_size(group) == 1:
        msg = f"{what} needs two ranks or more in a process group; here is one"
        raise InvalidInputError(msg)
    return group
