"""Failures: what ranks replied when a cell failed, put into words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit._ranks import format_ranks
from dtkit.errors import RankError, RankFailure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dtkit.cluster import Reply

__all__ = ["failure_of", "freed_text", "missing_module_hint", "own_frames", "survived_text"]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CELL_LINE = re.compile(r"Cell[^\n]*?In\[\d+\][^\n]*?line (\d+)")
_ECHO = re.compile(
    r"gloo|nccl|Connection (closed|reset)|Broken pipe|aborted|is gone|was interrupted",
    re.IGNORECASE,
)
_CAUSE = re.compile(r"out of memory on the|mismatch between collectives")
"""Never an echo, also when it comes after the rank was released."""
_ECHO_TYPES = (
    "RuntimeError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "HorovodInternalError",
)
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_FRAME = re.compile(r"^File (?P<path>.+?):\d+, in |^Cell[ ]In\[", re.MULTILINE)
_LIBRARY = re.compile(r"site-packages/|dist-packages/|/lib/python3|/dtkit/(engine|cluster)/|^<")
_PACKAGE = re.compile(r"(?:site-packages|dist-packages)/([^/]+)")


def failure_of(reply: Reply, *, is_released: bool = False, death: str = "") -> RankFailure:
    """Return a rank's reply as a failure, with the cell's own line number.

    Args:
        reply: not ok.
        is_released: whether the rank's collectives were cut.
        death: how its engine ended, if it did.
    """
    if reply.status == "died":
        return RankFailure(reply.rank, "EngineDied", death, f"EngineDied: {death}")
    lines = _CELL_LINE.findall(_ANSI.sub("", reply.traceback))
    is_echo = not _CAUSE.search(reply.evalue) and bool(
        (is_released and reply.ename in ("KeyboardInterrupt", *_ECHO_TYPES))
        or (reply.ename in _ECHO_TYPES and _ECHO.search(reply.evalue))
    )
    return RankFailure(
        rank=reply.rank,
        ename=reply.ename or reply.status,
        evalue=reply.evalue,
        traceback=own_frames(reply.traceback) or f"{reply.ename}: {reply.evalue}",
        line=int(lines[-1]) if lines else None,
        is_echo=is_echo,
    )


def own_frames(traceback: str) -> str:
    """Return IPython's traceback with the user's own frames alone, the others counted.

    A traceback without any of them is left whole.
    """
    blocks = traceback.split("\n\n")
    packages = [_library_of(block) for block in blocks]
    if all(package != "" for package in packages[:-1]):
        return traceback
    kept: list[str] = []
    folded: list[str] = []
    for block, package in zip(blocks, packages, strict=True):
        if package:
            folded.append(package)
            continue
        if folded:
            kept.append(_folded_text(folded))
            folded = []
        kept.append(block)
    return "\n\n".join(kept)


def _library_of(block: str) -> str | None:
    """Return the package that a block's frame is in, "" if the user's own, None for no frame."""
    found = _FRAME.search(_ANSI.sub("", block))
    if found is None:
        return None
    path = found["path"] or ""
    if not _LIBRARY.search(path):
        return ""
    package = _PACKAGE.search(path)
    return package[1] if package else "dtkit" if "/dtkit/" in path else "Python"


def _folded_text(packages: list[str]) -> str:
    noun = "frame" if len(packages) == 1 else "frames"
    return f"    [… {len(packages)} {noun} in {', '.join(dict.fromkeys(packages))}]"


def freed_text(places: Mapping[int, Mapping[str, Any]], world_size: int) -> str:
    """Return where each rank was when it was freed, as in «rank 0 was in all_reduce (…)».

    Args:
        places: `dtkit.engine.process.where.Place` as JSON values by rank; empty for a
            rank that did not answer.
        world_size: number of ranks.
    """
    by_text: dict[tuple[str, str], list[int]] = {}
    for rank, place in sorted(places.items()):
        if place.get("state") == "idle":  # it had come to its end by itself
            continue
        by_text.setdefault(_place_text(place), []).append(rank)
    parts = []
    for (where, what), ranks in by_text.items():
        verb = "was" if len(ranks) == 1 else "were"
        parts.append(f"{format_ranks(ranks, world_size)} {verb} {where} and {verb} {what}")
    return "; ".join(parts)


def survived_text(lost: Sequence[int], epilogue: str) -> str:
    """Return that a run went on without these ranks.

    Args:
        lost: the ranks.
        epilogue: what became of the session.
    """
    noun, pronoun = ("rank", "it") if len(lost) == 1 else ("ranks", "them")
    names = ", ".join(map(str, lost))
    return f"{noun} {names} died, and the others went on without {pronoun}; {epilogue}"


def missing_module_hint(error: RankError, host_of: Mapping[int, str]) -> str:
    """Return what to do when a module of the notebook's folder is not on another host.

    Args:
        error: what the cell failed with.
        host_of: by rank; empty for the driver's own host.

    Returns:
        A sentence; empty if that is not what failed.
    """
    for failure in error.failures:
        found = _NO_MODULE.search(failure.evalue)
        host = host_of.get(failure.rank)
        if failure.ename == "ModuleNotFoundError" and found and host:
            folder, name = Path.cwd(), found[1].partition(".")[0]
            if (folder / f"{name}.py").exists() or (folder / name).is_dir():
                return (
                    f"{name} is in {folder} here, and not on {host}: use a folder that all hosts "
                    f"share, or copy it (rsync -a {folder}/ {host}:{folder}) and start the "
                    f"engines anew"
                )
    return ""


def _place_text(place: Mapping[str, Any]) -> tuple[str, str]:
    state = place.get("state")
    line = place.get("line")
    name = f"{place['file']} line" if place.get("file") else "cell line"
    at = f" ({name} {line})" if line else ""
    if state == "collective":
        group = f" of {place['group']}" if place.get("group") else ""
        return f"in {place.get('operation') or 'a collective'}{group}{at}", "released"
    if state == "data":
        return f"waiting for data{at}", "stopped"
    if state == "python":
        return f"in Python{at}", "stopped"
    return "not answering", "stopped"
