"""`--hvd dtkit`: for the length of a run, `import horovod` gives dtkit's layer in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.engine.parts import Part
from dtkit.horovod import alias

if TYPE_CHECKING:
    from dtkit.engine.run import ActiveRun

__all__ = ["make"]


class ForcedAlias(Part):
    """Comes before an installed Horovod."""

    def begin(self) -> None:
        """Come before it."""
        alias.install(is_forced=True)

    def end(self, state: str) -> None:
        """Step back."""
        del state
        alias.install()


def make(_run: ActiveRun) -> Part:
    """Return the part for a run."""
    return ForcedAlias()
