"""Running a script as the main program of a rank, as `%run` does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from dtkit.engine.process.shell import current_shell

__all__ = ["run"]


def run(path: str, argv: list[str]) -> None:
    """Run the script at `path` with `argv`; its names stay in the rank's namespace.

    Unlike `%run` it lets the script's exceptions through, so that the cell fails.
    """
    __tracebackhide__ = True
    module = ModuleType("__main__")
    module.__file__ = path
    old_argv, old_path, old_main = sys.argv, list(sys.path), sys.modules["__main__"]
    code = compile(Path(path).read_text(), path, "exec")
    sys.argv = list(argv)
    sys.path.insert(0, str(Path(path).parent))
    # Classes of the script are pickled as members of __main__ while it runs.
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)  # noqa: S102  the user's own script
    finally:
        sys.argv, sys.path, sys.modules["__main__"] = old_argv, old_path, old_main
        names = {k: v for k, v in vars(module).items() if not k.startswith("__")}
        current_shell().user_ns.update(names)
