"""A job that goes on with the others when a rank ends: `horovodrun --min-np`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.horovod import world
from dtkit.horovod.launch.workers import Worker, Workers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtkit.horovod.launch.arguments import Arguments

__all__ = ["run_elastic"]

_SETTLE_S = 0.5
"""After a rank asks for a new deal: who fails because another died asks before that is seen."""


def run_elastic(arguments: Arguments, environment: Mapping[str, str]) -> Worker | None:
    """Run until all have ended well; returns the one without which it could not go on."""
    with tempfile.TemporaryDirectory(prefix="dtkit-hvd-") as name:
        folder = Path(name)
        world.write(folder, 1, list(range(arguments.num_proc)))
        workers = Workers(
            arguments.command,
            arguments.num_proc,
            {**environment, world.FOLDER: name, "HOROVOD_ELASTIC": "1"},
            arguments.output_dir,
        )
        try:
            return _go_on(workers, folder, arguments)
        finally:
            workers.stop()


def _go_on(workers: Workers, folder: Path, arguments: Arguments) -> Worker | None:
    number, num_lost = 1, 0
    while True:
        current = number
        failed = workers.wait(lambda: world.asked(folder, current))  # noqa: B023  called at once
        if failed is None and not workers.running:
            return None
        if failed is None:
            time.sleep(_SETTLE_S)
            failed = workers.wait(lambda: True)
        if failed is not None:
            num_lost += 1
            limit = arguments.reset_limit
            is_over = limit is not None and num_lost > limit
            if is_over or len(workers.running) < (arguments.min_num_proc or 1):
                return failed
            workers.drop(failed)
            left = len(workers.running)
            sys.stderr.write(f"horovodrun: worker {failed.number} ended; going on with {left}\n")
        number += 1
        world.write(folder, number, workers.running)
