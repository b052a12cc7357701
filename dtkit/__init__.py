"""dtkit: train a notebook's cells on every device.

In a notebook::

    %load_ext dtkit
    %dist_init -n 2

    %%dist_train
    ...  # an ordinary single-device training cell

On the driver: `Session`, `current_session()`, `last_run`, `last_sweep`,
`last_tuning`, `runs()` and the errors. On a rank: `log`, `control`, `checkpoint`,
`resume`, `shard`, `tensor_parallel` and `pipeline`. Everything is loaded on first use; importing
dtkit loads neither torch nor widgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.errors import DtkitError, InvalidInputError, RankError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from dtkit.driver.registry import current_session
    from dtkit.driver.runs.archive import runs
    from dtkit.driver.runs.run import Run
    from dtkit.driver.session import Session
    from dtkit.driver.trials.sweep import Sweep
    from dtkit.driver.trials.tune import BatchTuning, LrTuning
    from dtkit.engine.checkpointing.face import checkpoint, resume
    from dtkit.engine.livecontrols import control
    from dtkit.engine.log import log
    from dtkit.engine.parallel.pipelining import pipeline
    from dtkit.engine.parallel.sharding import shard
    from dtkit.engine.parallel.tensor import tensor_parallel

    last_run: Run | None
    last_sweep: Sweep | None
    last_tuning: BatchTuning | LrTuning | None

__version__ = "0.1.0"

__all__ = [
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
]

_LAZY = {
    "Session": "dtkit.driver.session",
    "checkpoint": "dtkit.engine.checkpointing.face",
    "control": "dtkit.engine.livecontrols",
    "current_session": "dtkit.driver.registry",
    "log": "dtkit.engine.log",
    "pipeline": "dtkit.engine.parallel.pipelining",
    "resume": "dtkit.engine.checkpointing.face",
    "runs": "dtkit.driver.runs.archive",
    "shard": "dtkit.engine.parallel.sharding",
    "tensor_parallel": "dtkit.engine.parallel.tensor",
}
_NEWEST = {"last_run": "run", "last_sweep": "sweep", "last_tuning": "tuning"}


def __getattr__(name: str) -> object:
    import importlib  # inside: the module's names are its public face

    if name in _NEWEST:
        return getattr(importlib.import_module("dtkit.driver.registry").Registry, _NEWEST[name])
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    msg = f"module 'dtkit' has no attribute {name!r}"
    raise AttributeError(msg)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics; called by `%load_ext dtkit`."""
    from dtkit.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take the magics away; called by `%unload_ext dtkit`. An open session stays open."""
    from dtkit.magics import unload

    unload(shell)
