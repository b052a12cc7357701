"""Models over several ranks go on in the next process group, if all of their ranks are in it.

Each rank has its part still. What is missing is a group: meshes are given the new one's, in place,
so that parameters, optimizers and hooks that refer to a mesh stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dtkit.engine.parallel.layout import MARK
from dtkit.engine.parallel.levelling import level
from dtkit.engine.parallel.meshes import make_mesh

if TYPE_CHECKING:
    from collections.abc import Sequence
    from weakref import ref

    from torch import nn

    from dtkit.engine.parallel.layout import Layout

__all__ = ["revive"]


def revive(retired: Sequence[ref[nn.Module]]) -> int:
    """Let models compute again, in the group that there is now; return how many. A collective.

    Those that all ranks have: some may hold one that the others have let go of.
    """
    group = dist.group.WORLD
    assert group is not None  # noqa: S101  it was just built
    models = {layout.number: (model, layout) for model, layout in _living(retired)}
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, list(models))
    everywhere = sorted(set(models).intersection(*numbers))
    for number in everywhere:
        model, layout = models[number]
        make_mesh(group, tuple(layout.mesh.mesh.shape), tuple(layout.mesh.mesh_dim_names or ()))
        steps = layout.renew(group)
        try:
            if layout.again is not None:
                layout.again(model)
        except Exception as error:  # noqa: BLE001  the model says it when it is used
            layout.gave_up(f"{type(error).__name__}: {error}")
        else:
            layout.fell_behind(level(model, layout, steps))
    return len(everywhere)


def _living(retired: Sequence[ref[nn.Module]]) -> list[tuple[nn.Module, Layout]]:
    """Return the models that are alive still and whose ranks can all be here."""
    found = [(model, model.__dict__[MARK]) for model in (r() for r in retired) if model is not None]
    everybody = list(range(dist.get_world_size()))
    return [
        (model, layout) for model, layout in found
        if layout.mesh.mesh.flatten().tolist() == everybody and layout.rank == dist.get_rank()
    ]  # fmt: skip
