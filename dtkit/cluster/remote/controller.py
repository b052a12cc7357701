"""The controller of a session over several hosts: ipyparallel's, which keeps a guardian posted.

On one host the engines do that. Over several they are elsewhere, and end with the controller: so
it is what must not go on for ever when kernel and guardian have been killed.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from dtkit.guard.posting import keep_posted

__all__ = ["GUARDIAN", "main"]

GUARDIAN = "dtkit.cluster.remote.guardian"


def main() -> None:
    """Run the controller until it is told to stop."""
    from ipyparallel.controller import app  # the notebook's kernel knows this module, not that one

    folder = Path(os.environ["DTKIT_SESSION_DIR"])
    name = "dtkit-keep-guardian"
    threading.Thread(target=keep_posted, args=(folder, GUARDIAN), name=name, daemon=True).start()
    app.main()


if __name__ == "__main__":
    main()
