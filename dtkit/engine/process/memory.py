"""Out of memory: named as such, with what to try next; what the traceback holds is let go.

The frames of a failed cell hold every tensor that was alive in its functions, and
IPython keeps the frames for post-mortem debugging. After this one error that would
make the next, smaller attempt fail as well.
"""

from __future__ import annotations

import gc
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any

import psutil

from dtkit._format import format_memory
from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from dtkit.engine.process.agent import Agent

__all__ = ["forget_last_error", "install", "is_out_of_memory"]

_NAMES = ("OutOfMemoryError", "MemoryError")
_TEXT = re.compile(r"DefaultCPUAllocator|can't allocate memory|CUDA out of memory|ALLOC_FAILED")
_BYTES = re.compile(r"tried to allocate (\d+) bytes|[Tt]ried to allocate ([\d.]+ \wiB)")


def install(owner: Agent) -> None:
    """Let this engine see to every cell that runs out of memory."""
    shell = current_shell()
    guard = _Guard(owner)
    shell._showtraceback = guard.telling(shell._showtraceback)  # noqa: SLF001  no public way
    shell.events.register("post_run_cell", guard.after_cell)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory, of the host or of a GPU, was what it lacked."""
    name = type(error).__name__
    return name in _NAMES or (name == "RuntimeError" and bool(_TEXT.search(str(error))))


def forget_last_error(error: BaseException | None) -> None:
    """Let go of the frames that an error came through; it has been shown.

    Args:
        error: the last one, None if there was none.
    """
    for each in _chain(error):
        _let_go(each.__traceback__)
        # A frame without variables holds its function still, and that what it closes over.
        each.__traceback__ = None
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)
    current_shell().InteractiveTB.tb = None  # IPython's, for %debug


class _Guard:
    def __init__(self, owner: Agent) -> None:
        self._owner = owner
        self._told: BaseException | None = None
        """The error that was given our words, by which it is not known any more."""

    # Any, below: IPython's own.

    def telling(self, original: Callable[..., None]) -> Callable[..., None]:
        """Return the shell's method that shows an error, such that it says what to try."""

        def _showtraceback(etype: Any, evalue: Any, stb: list[str]) -> None:
            if isinstance(evalue, BaseException) and is_out_of_memory(evalue):
                text = self._advice(evalue)
                self._told = evalue
                # The driver reads it from here, whoever shows the traceback.
                evalue.args = (text,)
                stb = [*stb, text]
            original(etype, evalue, stb)

        return _showtraceback

    def after_cell(self, result: Any) -> None:
        """Let go of what a failed cell's frames hold."""
        told, self._told = self._told, None
        error = getattr(result, "error_in_exec", None)
        if error is None or not (error is told or is_out_of_memory(error)):
            return
        forget_last_error(error)
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _advice(self, error: BaseException) -> str:
        found = _BYTES.search(str(error))
        asked = ""
        if found:
            size = format_memory(int(found[1])) if found[1] else found[2]
            asked = f", {size} wanted"
        where, used, total, mine = self._memory()
        return (
            f"out of memory on the {where}{asked}: {format_memory(used)} of {format_memory(total)} "
            f"in use, {format_memory(mine)} by this rank. What the failed cell held was let go. "
            f"Next: {self._next()}"
        )

    def _memory(self) -> tuple[str, int, int, int]:
        """Return where, and the bytes in use, there are, and this rank has."""
        group = self._owner.group
        if group is not None and group.device.type == "cuda":
            import torch  # loaded long since

            free, total = torch.cuda.mem_get_info(group.device)
            return "GPU", total - free, total, torch.cuda.memory_reserved(group.device)
        host = psutil.virtual_memory()
        return "CPU", host.total - host.available, host.total, psutil.Process().memory_info().rss

    def _next(self) -> str:
        """Return the next smaller thing to try."""
        run: Any = self._owner.run
        if run is None:
            return (
                "a smaller tensor, or del what is not needed any more; %dist_status shows the ranks"
            )
        size, recipe = run.recorder.batch_size, run.recipe.to_dict()
        more = ", or --amp bf16" if recipe.get("amp", "") in ("none", "off", None) else ""
        if size <= 1:
            return f"torch.utils.checkpoint around the largest layers{more}, or a smaller model"
        half = f"batches of {size // 2} in place of {size} on this rank"
        if "accumulate" in recipe:
            times = 2 * int(recipe["accumulate"] or 1)
            half += f" with --accumulate {times}, which leaves the global batch as it is"
        return half + more


def _let_go(tb: TracebackType | None) -> None:
    """Forget the variables of every function in a traceback, whoever holds the frames."""
    traceback.clear_frames(tb)
    while tb is not None:
        # Before Python 3.13 a frame keeps a copy of its variables for whoever has
        # asked for them, as IPython's traceback does; asking again renews it.
        _ = tb.tb_frame.f_locals
        tb = tb.tb_next


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            pending += [each.__cause__, each.__context__]
