"""Loading a checkpoint: each rank by itself, and nothing in it can run code.

`torch.load(weights_only=True)` reads tensors and plain values. The index that
torch.distributed.checkpoint writes beside them is a pickle: it is read by an
unpickler that knows the index's own classes and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dtkit.checkpoint_files import Manifest
from dtkit.engine.checkpointing.tree import assemble, dismantle, leaves, state_here
from dtkit.engine.models import parameters_of
from dtkit.engine.parallel.styles import contiguous, is_fused, separated
from dtkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["load"]

# Any, below: the user's own objects and their states.

_SAFE = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
_PATHS = ("pathlib", "pathlib._local")
"""Where Python keeps the class of the index's own path, which is of no use: 3.13 has moved it."""


def load(checkpoint: Path, objects: Mapping[str, Any], rank: int, world_size: int) -> Any:
    """Load objects in place from a whole checkpoint; return this rank's extra values.

    Args:
        checkpoint: its folder.
        objects: what to load, by the names that it was saved under.
        rank: this rank.
        world_size: how many there are; another number than wrote it may load
            what was equal on all ranks, or sharded.

    Returns:
        What was saved as extra, None if it was by another number of ranks.

    Raises:
        CheckpointError: an object is not in it, or does not fit.
    """
    manifest = Manifest.read(checkpoint)
    missing = [name for name in objects if name not in manifest.names]
    if missing:
        msg = f"no {', '.join(missing)} in {checkpoint}; it has {', '.join(manifest.names)}"
        raise CheckpointError(msg)
    is_same = manifest.world_size == world_size
    saved = _rest(checkpoint, rank if is_same else 0)
    outlines = {name: saved["objects"][name] for name in objects}
    if not is_same:
        _complete(outlines, objects, checkpoint, manifest.world_size)
    reader = _Reader(checkpoint)
    targets = _targets(objects, outlines, reader.read_metadata(), checkpoint)
    fused = {stored: t for stored, t in targets.items() if is_fused(t)}
    targets |= {stored: contiguous(t) for stored, t in fused.items()}
    if not is_same and any(name.startswith("rank ") for name in targets):
        msg = (
            f"{checkpoint} was written by {manifest.world_size} ranks whose states differed: "
            "that many can load it"
        )
        raise CheckpointError(msg)
    _read(reader, targets)
    for stored, live in fused.items():
        targets[stored] = separated(targets[stored], live)
    for name, thing in objects.items():
        state = assemble(outlines[name], targets)
        if isinstance(thing, torch.nn.Module) and any(p.is_meta for p in thing.parameters()):
            thing.load_state_dict(state, strict=False)  # a pipeline's: the rest is on other ranks
        else:
            thing.load_state_dict(state)
    return saved["extra"] if is_same else None


def _rest(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Return what a rank has saved beside its tensors."""
    # What compression has left out was on the rank's own device, which need not be there.
    path = checkpoint / f"rank-{rank}.pt"
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return saved


def _complete(
    outlines: dict[str, Any], objects: Mapping[str, Any], checkpoint: Path, num_ranks: int
) -> None:
    """Add what of a model only other ranks had: the stages of a pipeline."""
    wanted = {name: set(state_here(thing)) for name, thing in objects.items()
              if hasattr(thing, "parameters")}  # fmt: skip
    for rank in range(1, num_ranks):
        if all(names <= set(outlines[name]) for name, names in wanted.items()):
            return
        saved = _rest(checkpoint, rank)
        for name in wanted:
            outlines[name] = {**saved["objects"][name], **outlines[name]}
    for name, names in wanted.items():
        outlines[name] = {key: outlines[name][key] for key in names & set(outlines[name])}


class _Reader(FileSystemReader):
    """Reads the index without running what a pickle may ask for."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with (self.path / ".metadata").open("rb") as file:  # type: ignore[operator]
            metadata: Metadata = _Unpickler(file).load()
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _PATHS:
            return PurePosixPath
        if name in _SAFE.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        msg = f"the checkpoint's index asks for {module}.{name}, which no index needs"
        raise CheckpointError(msg)


def _targets(
    objects: Mapping[str, Any], outlines: dict[str, Any], metadata: Metadata, checkpoint: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors to load into: the objects' own where they have them, else new ones."""
    own: dict[str, torch.Tensor] = {}
    shards: dict[str, torch.Tensor] = {}
    for name, thing in objects.items():
        dismantle(state_here(thing), name, own)
        if isinstance(thing, torch.optim.Optimizer):
            shards |= {f"{name}/state/{i}": p for i, p in enumerate(parameters_of(thing))}
    targets = {}
    for stored in (leaf for outline in outlines.values() for leaf in leaves(outline)):
        entry = metadata.state_dict_metadata[stored]
        assert isinstance(entry, TensorStorageMetadata)  # noqa: S101  no others are written
        plain = stored.partition("/")[2] if stored.startswith("rank ") else stored
        live = own.get(plain)
        if live is not None and live.shape != entry.size:
            msg = (
                f"{plain} has shape {tuple(live.shape)} here and {tuple(entry.size)} in "
                f"{checkpoint}: not the same model?"
            )
            raise CheckpointError(msg)
        targets[stored] = (
            _new(entry, shards.get(plain.rpartition("/")[0])) if live is None else live
        )
    return targets


def _new(entry: TensorStorageMetadata, param: torch.Tensor | None) -> torch.Tensor:
    """Return an empty tensor for an optimizer's state, sharded as its parameter is."""
    if isinstance(param, DTensor) and param.shape == entry.size:
        return torch.empty_like(param, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


@torch.no_grad()
def _read(reader: _Reader, targets: dict[str, torch.Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    reader.read_data(planner.finish_plan(plan[0]), planner).wait()
