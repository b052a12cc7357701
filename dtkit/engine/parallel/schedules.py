"""The orders in which a pipeline's micro-batches are computed, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.errors import InvalidInputError, check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.pipelining import PipelineStage

__all__ = ["SCHEDULES", "check", "make_schedule", "stages_per_rank"]

# Any, throughout: torch's schedules have no common public type.

SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero-bubble": "ScheduleInterleavedZeroBubble",
}
"""What torch calls them."""
_MULTI = ("interleaved", "zero-bubble")
"""With several stages on each rank."""


def stages_per_rank(schedule: str) -> int:
    """Return how many stages a rank has by default."""
    return 2 if schedule in _MULTI else 1


def check(schedule: str, num_stages: int, num_ranks: int, num_microbatches: int) -> None:
    """Raise if a schedule cannot do that.

    Raises:
        InvalidInputError: it cannot.
    """
    check_choice("schedule=", schedule, tuple(SCHEDULES))
    reason = ""
    if schedule not in _MULTI and num_stages != num_ranks:
        reason = f"{schedule} has one stage on each rank: {num_stages} stages want as many ranks"
    elif num_microbatches < num_stages and schedule != "gpipe":
        reason = f"{num_microbatches} micro-batches: {schedule} wants {num_stages}, one a stage"
    elif schedule in _MULTI and num_microbatches % num_ranks:
        reason = (
            f"{num_microbatches} micro-batches: {schedule} wants a multiple of {num_ranks} ranks"
        )
    if reason:
        msg = f"dtkit.pipeline: {reason}"
        raise InvalidInputError(msg)


def make_schedule(
    name: str, stages: Sequence[PipelineStage], num_microbatches: int,
    loss_fn: Callable[..., Any] | None,
) -> Any:  # fmt: skip
    """Return torch's schedule over this rank's stages; "" is the simplest that any batch fits."""
    from torch.distributed import pipelining  # it loads torch's compiler

    is_single = name in ("gpipe", "1f1b") or (not name and len(stages) == 1)
    if is_single:
        kind: Any = getattr(pipelining, SCHEDULES[name or "gpipe"])
        return kind(stages[0], num_microbatches, loss_fn=loss_fn)
    kind = getattr(pipelining, SCHEDULES[name] if name else "ScheduleLoopedBFS")
    return kind(list(stages), num_microbatches, loss_fn=loss_fn)
