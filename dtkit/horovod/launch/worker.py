"""One rank of `horovod.run`: reads the call, and writes its result beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cloudpickle


def main() -> None:
    """Call the function that the folder of the first argument holds."""
    folder = Path(sys.argv[1])
    func, args, kwargs = cloudpickle.loads((folder / "call").read_bytes())
    result = func(*args, **kwargs)
    (folder / f"result.{os.environ['HOROVOD_RANK']}").write_bytes(cloudpickle.dumps(result))


if __name__ == "__main__":
    main()
