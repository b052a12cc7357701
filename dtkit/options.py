"""RunOptions: what a run is watched and guarded with; nothing here changes how it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dtkit.checkpoint_files import locate
from dtkit.errors import InvalidInputError, check_choice

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HVD", "ON_NAN", "WRITERS", "RunOptions"]

HVD = ("auto", "dtkit")
ON_NAN = ("warn", "stop", "ignore")
WRITERS = ("first", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of a run that are not its recipe.

    Attributes:
        auto_restart: when a rank's engine ends, a new one takes its place at once,
            with the state of a healthy rank; the run fails all the same.
        debug: let torch check every collective against the other ranks'; slower.
        hvd: what `import horovod.torch` gives: `auto`, Horovod where it is installed, or
            `dtkit`, its interface on torch.distributed.
        on_nan: what happens when a loss is not finite: `warn` (a note, once),
            `stop` (the run fails there, with its state kept) or `ignore`.
        max_steps: after so many steps the run stops; None: when the cell ends.
        profile: so many steps are profiled by torch's profiler; 0: none.
        tensorboard: where the run is written for TensorBoard, in a folder of its
            name; "" means its own folder, None not at all.
        tensorboard_graph: whether the model's graph is written too.
        timeline: file of the run's timeline; "" means `timeline.json` in its own
            folder (`timeline.json.gz` of the whole run), None no timeline.
        timeline_steps: how many of the last steps it shows; 0: the whole run.
        timeline_mark_cycles: whether it marks where each step begins (CYCLE_START).
        writers: whose `SummaryWriter` writes, the `first` rank's or those of `all`.
        checkpoint_every: steps between two checkpoints; 0: only where the cell
            calls `dtkit.checkpoint`.
        checkpoint_keep: how many checkpoints of the run are kept.
        resume: the run to go on from, by name or path, `last`, or "".
    """

    auto_restart: bool = False
    debug: bool = False
    hvd: str = "auto"
    on_nan: str = "warn"
    max_steps: int | None = None
    profile: int = 0
    tensorboard: str | None = None
    tensorboard_graph: bool = False
    timeline: str | None = None
    timeline_steps: int = 200
    timeline_mark_cycles: bool = False
    writers: str = "first"
    checkpoint_every: int = 0
    checkpoint_keep: int = 3
    resume: str = ""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            msg = f"--max-steps {self.max_steps}: 1 or more"
            raise InvalidInputError(msg)
        check_choice("--hvd", self.hvd, HVD)
        check_choice("--on-nan", self.on_nan, ON_NAN)
        if self.profile < 0:
            msg = f"--profile {self.profile}: it takes a number of steps"
            raise InvalidInputError(msg)
        if self.tensorboard_graph and self.tensorboard is None:
            msg = "--tensorboard-graph: TensorBoard shows it, so add --tensorboard"
            raise InvalidInputError(msg)
        if self.timeline_steps < 0:
            msg = f"--timeline-steps {self.timeline_steps}: 0 means all, else a number of steps"
            raise InvalidInputError(msg)
        check_choice("--writers", self.writers, WRITERS)
        if self.checkpoint_every < 0:
            msg = f"--checkpoint-every {self.checkpoint_every}: a number of steps, or 0 for none"
            raise InvalidInputError(msg)
        if self.checkpoint_keep < 1:
            msg = f"--checkpoint-keep {self.checkpoint_keep}: keep one at least"
            raise InvalidInputError(msg)

    def located(self, runs_dir: Path) -> RunOptions:
        """Return the options with `resume` as the path of a checkpoint.

        Raises:
            InvalidInputError: there is none under that name.
        """
        if not self.resume:
            return self
        return replace(self, resume=str(locate(runs_dir, self.resume)))

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what takes part in the run on each rank: `module:function` and its arguments.

        The driver names engine code by string and never imports it; see
        `dtkit.engine.parts`.
        """
        parts: list[tuple[str, dict[str, Any]]] = [("dtkit.engine.parts.keeper:make", {})]
        if self.max_steps is not None:
            parts.append(("dtkit.engine.parts.limits:make_steps", {"num_steps": self.max_steps}))
        if self.hvd == "dtkit":
            parts.append(("dtkit.horovod.part:make", {}))
        if self.on_nan != "ignore":
            parts.append(("dtkit.engine.parts.nan_guard:make", {"is_fatal": self.on_nan == "stop"}))
        if self.writers == "first":
            parts.append(("dtkit.engine.parts.writers:make", {}))
        parts.append(("dtkit.engine.parts.noise:make", {}))
        if self.tensorboard is not None:
            parts.append(("dtkit.engine.parts.grad_norm:make", {}))
        if self.tensorboard_graph:
            parts.append(("dtkit.engine.parts.model_graph:make", {}))
        if self.profile:
            steps = {"num_steps": self.profile}
            parts.append(("dtkit.engine.trace.profile:make", steps))
        if self.timeline is not None:
            options = {
                "num_steps": self.timeline_steps or None,
                "mark_cycles": self.timeline_mark_cycles,
            }
            parts.append(("dtkit.engine.trace.timeline:make", options))
        arguments = {
            "every": self.checkpoint_every, "keep": self.checkpoint_keep, "resume": self.resume
        }  # fmt: skip
        parts.append(("dtkit.engine.checkpointing.part:make", arguments))
        return parts
