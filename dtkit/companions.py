"""What follows a run on the driver beside the dashboard: each begins here and ends with the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtkit.run import Run
    from dtkit.tensorboard.writer import TensorBoardWriter

__all__ = ["accompany", "tensorboard_writer"]


def accompany(run: Run) -> None:
    """Begin what the run's options ask for on the driver."""
    if run.options.tensorboard is not None:
        _write_tensorboard(run, run.options.tensorboard)
    if run.options.profile:
        run.at_end(_merge_profile)
    if run.options.timeline is not None:
        _write_timeline(run, run.options.timeline)


def tensorboard_writer(run: Run, folder: Path) -> TensorBoardWriter:
    """Return a writer of the run's event file."""
    from dtkit.tensorboard.writer import TensorBoardWriter  # 0.1 s, for those who ask for it

    settings = {**run.recipe.to_dict(), "ranks": len(run.ranks)}
    return TensorBoardWriter(run.news, folder, run.start_unix_s, settings)


def _write_tensorboard(run: Run, folder: str) -> None:
    from dtkit.tensorboard.writer import TensorBoardThread

    target = Path(folder).expanduser() / run.name if folder else run.dir / "tensorboard"
    try:
        thread = TensorBoardThread(tensorboard_writer(run, target))
    except OSError as error:
        run.note(f"the run is not written for TensorBoard: {error}")
        return
    run.at_end(lambda ended: thread.close(ended.state, ended.end_unix_s))


def _write_timeline(run: Run, file: str) -> None:
    from dtkit.trace.follow import TimelineThread, default_name

    steps = run.options.timeline_steps or None
    target = Path(file).expanduser() if file else run.dir / default_name(steps)
    try:
        thread = TimelineThread(run.dir, target, steps)
    except OSError as error:
        run.note(f"no timeline is written: {error}")
        return

    def end(ended: Run) -> None:
        thread.close()
        ended.note(f"timeline in {target}; %dist_timeline shows where the time went")

    run.at_end(end)


def _merge_profile(run: Run) -> None:
    from dtkit.trace.profiles import write_profile

    target = run.dir / "profile.json.gz"
    if write_profile(run.dir, target):
        run.note(f"profile in {target}; %dist_timeline --operators shows the operators")
    else:
        run.note("no profile: the run ended before the steps that were to be profiled")
