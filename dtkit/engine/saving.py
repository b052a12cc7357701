"""Files that every rank of an unedited cell writes: whole, whoever is the last."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["whole_or_not_at_all"]

# Any, below: what torch.save takes.


def whole_or_not_at_all(original: Callable[..., None]) -> Callable[..., None]:
    """Return `torch.save` for ranks that write the same path at the same time.

    Each writes a file of its own and renames it. So a rank that loads the path
    right afterwards, perhaps from a folder of its own, finds a whole file there.
    """

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        target = Path(f).resolve() if isinstance(f, str | os.PathLike) else None
        if target is None or (target.exists() and not target.is_file()):
            original(obj, f, *args, **kwargs)  # a file object or a device
            return
        temporary = target.with_name(f"{target.name}.{platform.node()}-{os.getpid()}.tmp")
        try:
            original(obj, temporary, *args, **kwargs)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    return save
