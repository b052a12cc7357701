"""`dtkit.tensor_parallel`: a rank has some of the outputs, inputs or heads of large layers."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, cast
from weakref import ref

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from dtkit.engine import randomness, weights
from dtkit.engine.parallel.attention import divide_attention, why_not_divided
from dtkit.engine.parallel.layout import Layout, group_here, layout_of, mark
from dtkit.engine.parallel.materialize import materialize_own
from dtkit.engine.parallel.meshes import device_here, make_mesh
from dtkit.engine.parallel.regions import make_region
from dtkit.engine.parallel.renewal import Renewal
from dtkit.engine.parallel.report import say, tensor_summary, tensor_table
from dtkit.engine.parallel.styles import Colwise, Rowwise, fuse
from dtkit.engine.parallel.tensor_plan import Choice, choose, shared_layers
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["tensor_parallel"]

_STYLES = ("colwise", "rowwise", "fused:N", "heads", "whole")


def tensor_parallel(
    model: nn.Module,
    plan: str | Mapping[str, str | ParallelStyle] = "auto",
    *,
    num_ranks: int | None = None,
) -> nn.Module:
    """Divide large layers over the ranks, in place (torch's DTensor); call it on all ranks.

    Each rank computes its outputs or heads of a layer, and the results are those of the
    whole. The ranks that hold a model together get the same batches. It starts from rank 0's
    weights; optimizers made before go on with the divided parameters.

    Args:
        model: the model; its class, `state_dict` keys and forward pass stay.
        plan: `"auto"` finds the attention and the MLPs of `nn.Transformer*` and of common
            hand-written models; or a style for each layer to divide, by its name in the model
            (`*` stands for anything): `colwise` (outputs), `rowwise` (inputs), `fused:N`
            (outputs of N layers side by side in one), `heads` (`nn.MultiheadAttention`), or
            one of torch's parallel styles, which is applied as it is.
        num_ranks: over how many ranks; None: all. Fewer make copies, which train on
            different data.

    Raises:
        InvalidInputError: there is one rank only, nothing can be divided, or a layer of the
            plan cannot.
    """
    group = group_here("dtkit.tensor_parallel")
    world_size = dist.get_world_size(group)
    width = num_ranks or world_size
    _check(model, plan, width, world_size)
    styles: dict[str, ParallelStyle] = {}
    choices = (
        choose(model, width) if isinstance(plan, str) else _planned(model, plan, width, styles)
    )
    table = tensor_table(model, choices)
    if not any(choice.style != "whole" for choice in choices):
        msg = (
            f"dtkit.tensor_parallel: nothing in {type(model).__name__} can be divided over "
            f"{width} ranks:\n{table}\nName layers in plan={{…}}, or use dtkit.shard"
        )
        raise InvalidInputError(msg)
    mesh = make_mesh(group, (world_size // width, width), ("data", "tensor"))
    renewal = Renewal(model)
    randomness.share(group)
    _divide(model, {c.path: c for c in choices}, styles, mesh["tensor"], group)
    _make_regions(model, choices, mesh["tensor"])
    renewal.renew()
    row = dist.get_rank(group) // width
    layout = Layout("tensor parallel", mesh, row, world_size // width, width, False, ref(group))
    mark(model, layout)
    say(group, tensor_summary(model, choices, width))
    if not dist.get_rank(group):
        print(table)  # noqa: T201  the cell's own output
    return model


def _check(model: nn.Module, plan: object, width: int, world_size: int) -> None:
    known, msg = layout_of([model]), ""
    if known is not None:
        msg = f"dtkit.tensor_parallel: the model is {known.kind} already"
    elif width < 2 or world_size % width:  # noqa: PLR2004  to divide
        msg = f"dtkit.tensor_parallel(num_ranks={width}): 2 or more, and a divisor of {world_size}"
    elif isinstance(plan, str) and plan != "auto":
        msg = f'dtkit.tensor_parallel(plan={plan!r}): "auto", or a dict of layers and styles'
    if msg:
        raise InvalidInputError(msg)


def _planned(
    model: nn.Module, plan: Mapping[str, str | ParallelStyle], num_ranks: int,
    styles: dict[str, ParallelStyle],
) -> list[Choice]:  # fmt: skip
    """Return what becomes of each module by the user's plan; puts torch's styles into `styles`."""
    modules = dict(model.named_modules())
    shared = shared_layers(model)
    found = {}
    for pattern, style in plan.items():
        paths = [path for path in modules if path and fnmatch(path, pattern)]
        if not paths:
            near = ", ".join(path for path in modules if path) or "none"
            msg = f"dtkit.tensor_parallel: no layer is called {pattern!r}; there are: {near}"
            raise InvalidInputError(msg)
        for path in paths:
            name = "torch's" if isinstance(style, ParallelStyle) else str(style)
            reason = _why_not(modules[path], name, num_ranks)
            if path in shared:
                reason = "it shares its weights with another layer"
            if reason:
                msg = f"dtkit.tensor_parallel: {path} cannot be {name}: {reason}"
                raise InvalidInputError(msg)
            if isinstance(style, ParallelStyle):
                styles[path] = style
            found[path] = Choice(path, name, "the plan", _caller(modules, path))
    rest = [
        Choice(path, "whole", "")
        for path, module in modules.items()
        if path not in found and any(True for _ in module.parameters(recurse=False))
    ]
    return [*found.values(), *rest]


def _why_not(module: nn.Module, style: str, num_ranks: int) -> str:
    kind, _, number = style.partition(":")
    if kind in ("torch's", "whole"):
        return ""
    if kind == "heads":
        if type(module) is not nn.MultiheadAttention:
            return f"it is {type(module).__name__}, not nn.MultiheadAttention"
        return why_not_divided(module, num_ranks)
    if kind not in ("colwise", "rowwise", "fused") or (kind == "fused") != number.isdigit():
        return f"styles are {', '.join(_STYLES)}"
    if type(module) is nn.Embedding and kind != "fused":
        sizes = (module.num_embeddings, module.embedding_dim)
    elif type(module) is nn.Linear:
        sizes = (module.in_features, module.out_features)
    else:
        return f"it is {type(module).__name__}, not nn.Linear or nn.Embedding"
    size, parts = sizes[kind != "rowwise"], int(number or 1) * num_ranks
    return f"{size} is not a multiple of {parts}" if size % parts else ""


def _caller(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the name of the innermost module around one whose forward pass is called."""
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
            break
    return path


def _divide(
    model: nn.Module, choices: Mapping[str, Choice], styles: Mapping[str, ParallelStyle],
    mesh: DeviceMesh, group: dist.ProcessGroup,
) -> None:  # fmt: skip
    """Give each module its weights, and keep this rank's part: one module at a time."""
    done: set[int] = set()
    for path, module in list(model.named_modules()):
        choice = choices.get(path)
        kind, _, number = ("whole" if choice is None else choice.style).partition(":")
        for part in [module, module.out_proj] if kind == "heads" else [module]:
            if id(part) not in done:
                done.add(id(part))
                materialize_own(part, device_here())
                state = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
                weights.broadcast(state, group)
        if kind == "heads":
            divide_attention(module, mesh)
        elif kind == "fused":
            fuse(cast("nn.Linear", module), mesh, int(number))
        elif kind != "whole":
            style = styles.get(path) or (Colwise() if kind == "colwise" else Rowwise())
            style.src_data_rank = None  # all ranks have the weights
            parallelize_module(module, mesh, style)


def _make_regions(model: nn.Module, choices: list[Choice], mesh: DeviceMesh) -> None:
    modules = dict(model.named_modules())
    regions: dict[str, bool] = {}
    for choice in choices:
        if choice.style in ("whole", "heads", "torch's"):
            continue
        regions[choice.region] = regions.get(choice.region, False) or choice.has_several
    for path, module in modules.items():
        # In evaluation they hand their layers' weights to one kernel, unless a mode is on.
        has_kernel = isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)
        if has_kernel and any(c.path.startswith(path) for c in choices if c.style != "whole"):
            regions.setdefault(path, False)
    for path, has_several in regions.items():
        make_region(modules[path], mesh, has_several=has_several)
