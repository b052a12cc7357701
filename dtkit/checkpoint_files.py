"""Where checkpoints lie, and which of them are whole; read by the driver and written by the ranks.

    <run>/checkpoints/step-00000120/
        .metadata, __0_0.distcp, …   the tensors, in torch.distributed.checkpoint's format
        rank-0.pt, …                 the rest of each rank: numbers, random state, data position
        checkpoint.json              the manifest

A checkpoint is written into a folder whose name begins with a dot, the
manifest last, and then renamed: a folder `step-…` is whole, whatever happened
to the processes that wrote it. The sizes in the manifest tell one that was
damaged later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from dtkit.errors import InvalidInputError

__all__ = ["FOLDER", "Manifest", "free_name", "locate", "newest", "prune", "publish", "whole"]

FOLDER = "checkpoints"
"""Name of the folder, inside a run's, that holds its checkpoints."""
LAST = "last"
_MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        step: optimizer steps made when it was taken.
        epoch: passes over the data begun then, from 0.
        world_size: how many ranks wrote it.
        names: the objects in it.
        files: size in bytes of each file but the manifest.
        time_unix_s: when it was taken.
    """

    step: int
    epoch: int
    world_size: int
    names: list[str]
    files: dict[str, int]
    time_unix_s: float

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            InvalidInputError: there is none, or a file is missing or cut off.
        """
        try:
            manifest = cls(**json.loads((checkpoint / _MANIFEST).read_text()))
            for name, size in manifest.files.items():
                found = (checkpoint / name).stat().st_size
                if found != size:
                    msg = f"{checkpoint / name} has {found} bytes and not {size}"
                    raise InvalidInputError(msg)
        except (OSError, ValueError, TypeError) as error:
            msg = f"{checkpoint} is no whole checkpoint: {error}"
            raise InvalidInputError(msg) from error
        return manifest


def free_name(folder: Path, step: int) -> str:
    """Return a name for the checkpoint of a step that is not taken in the folder."""
    name, number = f"step-{step:08d}", 1
    while (folder / name).exists():
        number += 1
        name = f"step-{step:08d}.{number}"
    return name


def publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and give the finished folder its name, each safely on the disk first."""
    with (temporary / _MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)


def whole(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder whose files are all there, oldest first."""
    found = (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and _is_whole(p))
    return sorted(found, key=_order)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run's or a checkpoints' folder, or the path itself.

    Args:
        folder: a run's folder, its `checkpoints`, or one checkpoint.
    """
    if _is_whole(folder):
        return folder
    found = whole(folder) or whole(folder / FOLDER)
    return found[-1] if found else None


def locate(runs_dir: Path, text: str) -> Path:
    """Return the checkpoint that `--resume` names.

    Args:
        runs_dir: where the runs have their folders.
        text: a run's name, a path, or `last`: the run that wrote one most recently.

    Raises:
        InvalidInputError: there is no whole checkpoint.
    """
    by_run = {path.parent.name: newest(path) for path in runs_dir.glob(f"*/{FOLDER}")}
    found = {name: path for name, path in by_run.items() if path is not None}
    if text == LAST:
        if found:
            return max(found.values(), key=lambda path: Manifest.read(path).time_unix_s)
    elif text in found:
        return found[text]
    else:
        given = newest(Path(text).expanduser())
        if given is not None:
            return given.resolve()
    known = f"runs with one: {', '.join(sorted(found))}" if found else f"no run in {runs_dir} has"
    msg = f"--resume {text}: no whole checkpoint there ({known}); --checkpoint-every N makes them"
    raise InvalidInputError(msg)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; of a link, not what it leads to."""
    for path in whole(folder)[:-keep]:
        if path.is_symlink():
            path.unlink()
            continue
        (path / _MANIFEST).unlink()  # first, so that what is half removed is no checkpoint
        shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    try:
        Manifest.read(path)
    except InvalidInputError:
        return False
    return True


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # noqa: S101  for the type checker: it was matched before
    return int(match[1]), int(match[2] or 1)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
