"""What a rank says of itself while it is busy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from dtkit.engine.process.agent import Agent

__all__ = ["install"]


def install(owner: Agent) -> None:
    """Let the agent answer `status`."""
    process = psutil.Process()

    def status(_request: dict[str, Any]) -> dict[str, Any]:
        used, total = process.memory_info().rss, psutil.virtual_memory().total
        if owner.group is not None and owner.group.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(owner.group.device)
            used = total - free
        return {
            "state": "busy" if owner.is_busy else "idle",
            "used_bytes": used,
            "total_bytes": total,
        }

    owner.on("status", status)
