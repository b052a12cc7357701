"""What follows a run on the driver beside the dashboard: each begins here and ends with the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtkit.driver.runs.run import Run
    from dtkit.tensorboard.writer import TensorBoardWriter

__all__ = ["accompany", "write_tensorboard"]


def accompany(run: Run) -> None:
    """Begin what the run's options ask for on the driver."""
    if run.options.tensorboard is not None:
        _write_tensorboard(run, run.options.tensorboard)
    if run.options.profile:
        run.at_end(_merge_profile)
    if run.options.timeline is not None:
        _write_timeline(run, run.options.timeline)


def write_tensorboard(run: Run, folder: Path) -> None:
    """Write a run for TensorBoard as it is now."""
    _tensorboard_writer(run, folder).close(run.state, run.end_unix_s)
    _share_profiles(run, folder)


def _tensorboard_writer(run: Run, folder: Path) -> TensorBoardWriter:
    from dtkit.tensorboard.writer import TensorBoardWriter  # 0.1 s, for those who ask for it

    settings = {**run.recipe.to_dict(), "ranks": len(run.ranks)}
    graph = run.dir / "graph.pb"
    return TensorBoardWriter(run.news, folder, run.start_unix_s, settings, graph)


def _write_tensorboard(run: Run, folder: str) -> None:
    from dtkit.tensorboard.writer import TensorBoardThread

    target = Path(folder).expanduser() / run.name if folder else run.dir / "tensorboard"
    try:
        thread = TensorBoardThread(_tensorboard_writer(run, target))
    except OSError as error:
        run.note(f"the run is not written for TensorBoard: {error}")
        return

    def end(ended: Run) -> None:
        thread.close(ended.state, ended.end_unix_s)
        _share_profiles(ended, target)

    run.at_end(end)


def _share_profiles(run: Run, folder: Path) -> None:
    """Put the ranks' profiles where TensorBoard's profiler tab (torch-tb-profiler) looks."""
    from dtkit.trace.profiles import profile_path

    for rank in run.ranks:
        # The tab wants <host>_<number>.pt.trace.json.
        shared = folder / f"rank_{rank}.pt.trace.json"
        if profile_path(run.dir, rank).exists() and not shared.exists():
            shutil.copyfile(profile_path(run.dir, rank), shared)


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
        if thread.close():
            ended.note(f"timeline in {target}; %dist_timeline shows where the time went")
        else:
            ended.note(
                "no timeline: there is nothing in the run's folder that the ranks wrote of it"
            )

    run.at_end(end)


def _merge_profile(run: Run) -> None:
    from dtkit.trace.profiles import write_profile

    target = run.dir / "profile.json.gz"
    if write_profile(run.dir, target):
        run.note(f"profile in {target}; %dist_timeline --operators shows the operators")
    else:
        run.note("no profile: the run ended before the steps that were to be profiled")
