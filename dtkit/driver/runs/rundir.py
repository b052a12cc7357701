"""A run's folder: made under a name of its own; its facts written whole or not at all, and read."""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import psutil

from dtkit.errors import InvalidInputError
from dtkit.values import RunFacts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dtkit.driver.runs.run import Run

__all__ = ["new_folder", "read_facts", "storing", "write_facts"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def new_folder(parent: Path, name: str | None) -> Path:
    """Make a folder for a run; a name that is taken gets a number.

    Raises:
        InvalidInputError: the name is no plain file name, or nothing can be made there.
    """
    if name is not None and not _NAME.fullmatch(name):
        msg = (
            f"--name {name}: use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
        raise InvalidInputError(msg)
    base = name or time.strftime("%Y%m%d-%H%M%S")
    with storing():
        parent.mkdir(parents=True, exist_ok=True)
        return _made(parent, base)


@contextmanager
def storing() -> Iterator[None]:
    """Say what to do if nothing can be written: read-only, full, or a file of that name.

    Raises:
        InvalidInputError: so it is.
    """
    try:
        yield
    except OSError as error:
        msg = f"no run can be stored: {error}; %config DistMagics.runs_dir names another folder"
        raise InvalidInputError(msg) from None


def _made(parent: Path, base: str) -> Path:
    number = 1
    while True:
        folder = parent / (base if number == 1 else f"{base}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder.resolve()


def read_facts(folder: Path) -> RunFacts:
    """Return what a run's `run.json` says.

    Raises:
        InvalidInputError: the folder holds no run.
    """
    try:
        facts = json.loads((folder / "run.json").read_text())
        known = {f.name: facts[f.name] for f in fields(RunFacts) if f.name in facts}
        known |= {"name": folder.name, "dir": folder}
        known |= {name: tuple(known[name]) for name in ("ranks", "notes") if name in known}
        return RunFacts(**known)
    except (OSError, ValueError, TypeError) as error:
        msg = f"{folder} holds no run that can be read: {error}"
        raise InvalidInputError(msg) from None


def write_facts(run: Run) -> None:
    """Write `run.json`: whole or not at all."""
    view = run.view()
    facts = {
        "name": run.name,
        "state": view.state,
        "recipe": run.recipe.to_dict(),
        "options": asdict(run.options),
        "environment": run.environment,
        "ranks": list(run.ranks),
        "start_unix_s": run.start_unix_s,
        "elapsed_s": view.elapsed_s,
        "num_steps": view.step,
        "loss": None if math.isnan(view.loss) else view.loss,
        "notes": list(view.notes),
        "error": view.error,
        "driver": _driver(),
    }
    temporary = run.dir / "run.json.tmp"
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(run.dir / "run.json")


def _driver() -> dict[str, Any]:  # Any: JSON
    """Return who drives the run, so that another kernel can tell whether it goes on."""
    process = psutil.Process()
    return {"pid": process.pid, "start_unix_s": process.create_time()}
