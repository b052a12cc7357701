"""Layout: which ranks hold one model together, and which of them train on the same data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtkit.engine.agent import agent
from dtkit.errors import InvalidInputError
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from dtkit.recipe import Recipe

__all__ = [
    "MARK",
    "Layout",
    "adopt_mesh",
    "current_run",
    "device_here",
    "group_here",
    "groups_of",
    "layout_of",
    "make_mesh",
    "mark",
]

MARK = "_dtkit_layout"
_MESHES: WeakKeyDictionary[dist.ProcessGroup, dict[Any, DeviceMesh]] = WeakKeyDictionary()
"""Made once for each group: every mesh opens connections."""


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
    _warning: str = ""
    _reason: str = ""

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

    def renew(self, group: dist.ProcessGroup) -> None:
        """Go on in another group of the same ranks, of which the mesh has the groups already."""
        self._group, self._world = ref(group), ref(group)
        steps: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(steps, self.num_steps, group=group)
        behind = [rank for rank, step in enumerate(steps) if step < max(steps)]
        if behind:
            self._warning = (
                f"the model that is {self.kind}: on ranks {', '.join(map(str, behind))} its parts "
                "lack the step in which a rank failed, which the others have made. Load the newest "
                "checkpoint (dtkit.resume) for one that is of a piece"
            )
        self.num_steps = max(steps)

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


def _nothing() -> None:
    """Stand in for a reference to a group that is gone."""


def mark(model: nn.Module, layout: Layout) -> None:
    """Let it be known that a model is laid out, to the run that is active too."""
    model.__dict__[MARK] = layout
    run = current_run()
    if run is not None:
        run.arrange(layout)


def layout_of(models: Iterable[nn.Module]) -> Layout | None:
    """Return the layout of the first of these models that has one, in it or in a part of it."""
    for model in models:
        for module in model.modules():
            layout = module.__dict__.get(MARK)
            if layout is not None:
                return layout  # type: ignore[no-any-return]  # we put it there
    return None


def current_run() -> Any:
    """Return the run that is active on this rank, None if there is none."""
    try:
        return agent().run
    except RuntimeError:  # a plain process, such as a script under torchrun
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


def device_here() -> torch.device:
    """Return the device that this rank computes on."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_mesh(
    group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]
) -> DeviceMesh:
    """Return the mesh of a group's ranks in this shape, the last axis' ranks side by side."""
    known = _MESHES.setdefault(group, {})
    if (shape, names) not in known:
        known[shape, names] = _new_mesh(group, shape, names)
    return known[shape, names]


def _new_mesh(
    group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]
) -> DeviceMesh:
    device = device_here().type
    ranks = torch.tensor(dist.get_process_group_ranks(group)).reshape(shape)
    groups = groups_of(group, shape)
    if len(shape) == 1:
        return DeviceMesh.from_group(group, device, mesh_dim_names=names)
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=names)


def groups_of(group: dist.ProcessGroup, shape: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """Return this rank's group along each axis of a mesh of a group's ranks; a collective."""
    if len(shape) == 1:
        return [group]
    ranks = torch.tensor(dist.get_process_group_ranks(group)).reshape(shape)
    place = [int(i) for i in (ranks == dist.get_rank()).nonzero()[0]]
    groups = []
    for axis in range(len(shape)):
        index = [slice(None) if i == axis else place[i] for i in range(len(shape))]
        line = ranks[tuple(index)].tolist()
        # Locally: only those who are in it make it, so that other ranks need not be here.
        groups.append(dist.new_group(line, use_local_synchronization=True))
    return groups


def adopt_mesh(group: dist.ProcessGroup, mesh: DeviceMesh) -> None:
    """Let models that are laid out in a group use a mesh that has got its groups."""
    known = _MESHES.setdefault(group, {})
    known[tuple(mesh.mesh.shape), tuple(mesh.mesh_dim_names or ())] = mesh
