"""Which GPUs of this host cannot read each other's memory: asked of torch, in a process of its own.

An agent imports no torch, and one that did would hold a CUDA context on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["pairs_without_access"]

_TIMEOUT_S = 60.0
_SCRIPT = """
import itertools, json, torch
pairs = itertools.combinations(range(torch.cuda.device_count()), 2)
print(json.dumps([
    pair for pair in pairs
    if not (torch.cuda.can_device_access_peer(*pair)
            and torch.cuda.can_device_access_peer(*pair[::-1]))
]))
"""


def pairs_without_access() -> list[tuple[int, int]]:
    """Return the pairs of GPUs that reach each other only through the host's memory.

    Raises:
        OSError: they could not be asked; the text has the reason.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=_TIMEOUT_S,
            check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said: list[str] = error.stderr.strip().splitlines()
        raise OSError(said[-1] if said else str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise OSError(str(error)) from error
    return [(a, b) for a, b in json.loads(done.stdout)]
