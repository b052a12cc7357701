"""Every magic there is: what holds it, and what its line may say."""

from __future__ import annotations

from dtkit.magics.attaching import ORPHANS, DistOrphanMagics
from dtkit.magics.carrying import CHECK, PULL, PUSH, DistObjectMagics
from dtkit.magics.exporting import EXPORT, DistExportMagics
from dtkit.magics.lines import DIST, STOP, TRAIN
from dtkit.magics.looking import RUNS, TENSORBOARD, TIMELINE, DistLookMagics
from dtkit.magics.opening import INIT, SHUTDOWN, STATUS, WHERE, DistMagics
from dtkit.magics.repairing import RESET, RESTART, DistRepairMagics
from dtkit.magics.running import DistCellMagics
from dtkit.magics.steering import CONTROL, DistControlMagics
from dtkit.magics.tuning import SWEEP, TUNE, DistTuneMagics

__all__ = ["MAGICS", "PARSERS", "TWINS", "document"]

MAGICS = (
    DistMagics,
    DistCellMagics,
    DistControlMagics,
    DistObjectMagics,
    DistLookMagics,
    DistOrphanMagics,
    DistRepairMagics,
    DistTuneMagics,
    DistExportMagics,
)
PARSERS = {
    parser.magic: parser
    for parser in (
        INIT, TRAIN, DIST, STOP, CONTROL, STATUS, WHERE, RESTART, RESET, SHUTDOWN,
        PUSH, PULL, CHECK, SWEEP, TUNE, RUNS, TENSORBOARD, TIMELINE, EXPORT, ORPHANS,
    )
}  # fmt: skip
"""By the magic's name, in the order in which a reader meets them."""

TWINS = {
    "dist_init": "dtkit.Session.start",
    "dist_train": "dtkit.Session.train",
    "dist": "dtkit.Session.execute",
    "dist_stop": "dtkit.Session.stop",
    "dist_control": "dtkit.Session.set_controls",
    "dist_status": "dtkit.Session.status",
    "dist_where": "dtkit.Session.where",
    "dist_restart": "dtkit.Session.restart",
    "dist_reset": "dtkit.Session.reset_group",
    "dist_shutdown": "dtkit.Session.close",
    "dist_push": "dtkit.Session.push",
    "dist_pull": "dtkit.Session.pull",
    "dist_check": "dtkit.Session.check",
    "dist_sweep": "dtkit.Session.sweep",
    "dist_tune": "dtkit.Session.tune",
    "dist_runs": "dtkit.runs",
    "dist_tensorboard": "dtkit.Session.tensorboard",
    "dist_timeline": "dtkit.driver.runs.run.Run.timeline",
    "dist_export": "dtkit.export.write_script",
    "dist_orphans": "dtkit.Session.orphans",
}
"""What does the same from Python."""


def document() -> None:
    """Let `%magic?` show what `-h` prints: the options stand in one place only."""
    for made in MAGICS:
        for kinds in made.magics.values():
            for name, method in kinds.items():
                # IPython asks a magic for `getdoc` before it looks at the docstring. Formatting the
                # help of all takes 10 ms and more, so it is left until one is asked for.
                getattr(made, method).getdoc = PARSERS[name].format_help
