"""The public face, frozen: a name that is added, dropped or changed must be meant."""

from __future__ import annotations

import inspect
import pkgutil

import dtkit
from dtkit.driver.cells import CellVerbs
from dtkit.driver.core import SessionCore
from dtkit.driver.runs.run import Run
from dtkit.driver.session import Session
from dtkit.magics import MAGICS
from dtkit.magics.registry import TWINS

NAMES = {
    "DtkitError",
    "InvalidInputError",
    "RankError",
    "Session",
    "checkpoint",
    "control",
    "current_session",
    "last_run",
    "last_sweep",
    "last_tuning",
    "load_ipython_extension",
    "log",
    "pipeline",
    "resume",
    "runs",
    "shard",
    "tensor_parallel",
    "unload_ipython_extension",
}

SESSION = {
    "start": "(num_ranks, *, launch, devices, backend, oversubscribe, runs_dir, lease, is_debug, "
    "on_stage)",
    "attach": "(session_id)",
    "attaching": "(session_id)",
    "check_hosts": "(launch, *, on_stage)",
    "orphans": "()",
    "end_orphan": "(session_id)",
    "id": "property",
    "train": "(self, cell, *, recipe, options, name, ranks)",
    "training": "(self, cell, *, recipe, options, name, ranks)",
    "sweep": "(self, cell, axes, *, recipe, options, name, ranks)",
    "sweeping": "(self, cell, axes, *, recipe, options, name, ranks)",
    "tune": "(self, cell, what, *, settings, recipe, ranks)",
    "tuning": "(self, cell, what, *, settings, recipe, ranks)",
    "execute": "(self, cell, *, ranks)",
    "running": "(self, cell, *, ranks)",
    "pull": "(self, name, *, rank)",
    "push": "(self, objects, *, ranks)",
    "status": "(self)",
    "check": "(self, names)",
    "names": "(self, path)",
    "where": "(self)",
    "stop": "(self, *, now)",
    "set_controls": "(self, values)",
    "tensorboard": "(self, folder)",
    "reset_group": "(self)",
    "restart": "(self, ranks, *, refill)",
    "close": "(self)",
    "environment": "(self)",
    "pids": "(self)",
    "ranks": "property",
    "world_size": "property",
    "is_busy": "property",
}

RUN = {
    "load": "(folder)",
    "history": "property",
    "curves": "(self)",
    "notes": "property",
    "note": "(self, text)",
    "news": "(self, first_row, low, high)",
    "at_end": "(self, follow)",
    "timeline": "(self)",
    "operators": "(self)",
    "write_tensorboard": "(self, folder)",
    "end_unix_s": "property",
    "summaries": "property",
    "replay": "(self, event)",
    "replay_end": "(self, state, error, end_unix_s)",
    "state": "property",
    "view": "(self)",
    "wait": "(self, *, timeout_s)",
    "watching": "(self)",
    "pace": "(self)",
    "set_stall": "(self, text)",
    "stop": "(self)",
    "controls": "property",
    "changes": "property",
    "set_controls": "(self, values)",
    "pause": "(self, is_paused)",
    "set_state": "(self, state)",
    "end": "(self, state, error)",
    "write": "(self)",
}


def shape(function: object) -> str:
    """Return the names of a function's parameters, in its own order."""
    if isinstance(function, property):
        return "property"
    parts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(parameter.name)
    return f"({', '.join(parts)})"


def public(owner: type) -> dict[str, str]:
    """Return the public methods and properties of a class with their parameters."""
    return {
        name: shape(getattr(owner, name))
        for name in list(vars(owner))
        if not name.startswith("_") and name not in getattr(owner, "__annotations__", {})
    }


def test_the_names_of_the_package() -> None:
    assert set(dtkit.__all__) == NAMES
    for name in NAMES:
        assert hasattr(dtkit, name)


def test_what_a_session_offers() -> None:
    assert public(SessionCore) | public(CellVerbs) | public(Session) == SESSION


def test_what_a_run_offers() -> None:
    assert public(Run) == RUN


def test_every_magic_has_a_twin_on_the_session() -> None:
    magics = {name for made in MAGICS for kind in made.magics.values() for name in kind}
    assert magics == set(TWINS)
    for path in TWINS.values():
        assert callable(pkgutil.resolve_name(path)), path


def test_every_public_name_is_documented() -> None:
    documented = [
        getattr(dtkit, name) for name in NAMES - {"last_run", "last_sweep", "last_tuning"}
    ]
    documented += [getattr(Session, name) for name in SESSION]
    documented += [getattr(Run, name) for name in RUN]
    for thing in documented:
        assert inspect.getdoc(thing), thing


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(dtkit, "no_such_name")
