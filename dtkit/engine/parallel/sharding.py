"""`dtkit.shard`: a rank keeps a part of each parameter, its gradient and optimizer state."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dtkit.engine import randomness, weights
from dtkit.engine.models import state_of
from dtkit.engine.parallel.allocator import return_large_blocks
from dtkit.engine.parallel.layout import Layout, group_here, layout_of, mark
from dtkit.engine.parallel.materialize import materialize
from dtkit.engine.parallel.meshes import device_here, make_mesh
from dtkit.engine.parallel.renewal import Renewal
from dtkit.engine.parallel.report import say, summary
from dtkit.engine.parallel.units import choose_units
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard"]

MIN_UNIT_PARAMS = 1_000_000


def shard(
    model: nn.Module,
    *,
    num_shards: int | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    min_unit_params: int = MIN_UNIT_PARAMS,
) -> nn.Module:
    """Shard a model over the ranks, in place (torch's FSDP2), and return it; call it on all ranks.

    A unit (a repeated block, or a module large enough) is gathered while it computes. The
    model starts from rank 0's weights; optimizers made before go on with the sharded
    parameters. In a `%%dist_train` cell the DataLoaders are divided as ever.

    A model that does not fit one rank is made under `with torch.device("meta"):`; each unit
    gets its weights, by its modules' own `reset_parameters`, when it is its turn.

    Args:
        model: the model; its class, `state_dict` keys and forward pass stay.
        num_shards: over how many ranks; None: all of them. Fewer make copies: with 4 ranks
            and 2 shards there are 2 copies, whose gradients are averaged.
        param_dtype: what units are gathered and computed in (bfloat16: half the messages and
            half the memory of a gathered unit); the shards stay as they are.
        reduce_dtype: what gradients are averaged in; None: `param_dtype`.
        reshard_after_forward: whether a unit is let go of after its forward pass and gathered
            again for the backward pass: less memory, half as much again is sent.
        min_unit_params: units have so many parameters at least.

    Raises:
        InvalidInputError: there is one rank only, or num_shards does not divide their number.
    """
    group = group_here("dtkit.shard")
    known = layout_of([model])
    if known is not None:
        msg = f"dtkit.shard: the model is {known.kind} already"
        raise InvalidInputError(msg)
    mesh = _mesh(group, num_shards)
    if device_here().type == "cpu":
        return_large_blocks()
    renewal = Renewal(model)
    units = choose_units(model, min_unit_params)
    names = [type(unit).__name__ for unit in units]
    randomness.share(group)
    apply = partial(
        _shard_unit, mesh=mesh, dtypes=(param_dtype, reduce_dtype), reshard=reshard_after_forward
    )
    again = _apply_to(model, units, apply, group)
    renewal.renew()
    place = (dist.get_rank(group), dist.get_world_size(group))
    mark(model, Layout("sharded", mesh, *place, 1, True, ref(group), again=again))
    say(group, summary(model, names, mesh))
    return model


def _shard_unit(
    unit: nn.Module, *, is_model: bool, mesh: DeviceMesh,
    dtypes: tuple[torch.dtype | None, torch.dtype | None], reshard: bool,
) -> None:  # fmt: skip
    # The model alone returns float32: what is in it goes on from one unit to another as it is.
    output = torch.float32 if is_model and dtypes[0] else None
    policy = MixedPrecisionPolicy(*dtypes, output_dtype=output)
    fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _apply_to(
    model: nn.Module, units: Sequence[nn.Module], apply: Callable[..., None],
    group: dist.ProcessGroup,
) -> Callable[[nn.Module], None]:  # fmt: skip
    """Shard each unit of a model; return what does so again in another group."""
    paths = {id(module): path for path, module in model.named_modules()}
    for unit in units:
        materialize(unit, device_here())
        weights.broadcast(_plain(unit), group)
        apply(unit, is_model=unit is model)
    return partial(_again, apply=apply, units=[paths[id(unit)] for unit in units])


def _again(model: nn.Module, *, apply: Callable[..., None], units: Sequence[str]) -> None:
    """Shard a model that has its shards still, but no group: in the group that its mesh has now."""
    renewal = Renewal(model)
    shards = dict(model.named_parameters(remove_duplicate=False))
    blanks: dict[int, nn.Parameter] = {}  # FSDP lays them out; they have no memory
    for path, old in shards.items():
        owner, _, name = path.rpartition(".")
        blank = torch.empty(old.shape, dtype=old.dtype, device="meta")
        made = nn.Parameter(blank, requires_grad=old.requires_grad)
        setattr(model.get_submodule(owner), name, blanks.setdefault(id(old), made))
    for path in units:
        apply(model.get_submodule(path), is_model=not path)
    params = {
        id(s): nn.Parameter(s.detach(), requires_grad=s.requires_grad) for s in shards.values()
    }
    for old in shards.values():
        params[id(old)].grad = old.grad
    model.load_state_dict({n: params[id(s)] for n, s in shards.items()}, strict=False, assign=True)
    renewal.renew()


def _mesh(group: dist.ProcessGroup, num_shards: int | None) -> DeviceMesh:
    num_ranks = dist.get_world_size(group)
    if num_shards is None or num_shards == num_ranks:
        return make_mesh(group, (num_ranks,), ("data",))
    if num_shards < 1 or num_ranks % num_shards:
        msg = (
            f"dtkit.shard(num_shards={num_shards}): it must divide the number of ranks, {num_ranks}"
        )
        raise InvalidInputError(msg)
    return make_mesh(group, (num_ranks // num_shards, num_shards), ("copy", "shard"))


def _plain(unit: nn.Module) -> list[torch.Tensor]:
    """Return what a unit holds that no inner unit has sharded already."""
    return [t for t in state_of([unit], []) if type(t).__name__ != "DTensor"]
