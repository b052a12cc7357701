"""The peers' own environment, beside the project's and never in it.

It sees the project's packages, torch among them, so that every peer runs on the same ones, and adds
the peers: nothing that is there is installed again, and no other build of torch can come.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

__all__ = ["REQUIREMENTS", "install", "versions"]

_HERE = Path(__file__).parent
REQUIREMENTS = {
    "accelerate": "accelerate",
    "jupyter-distributed": "jupyter-distributed",
    "lightning-fabric": "lightning-fabric",
    "nbdistributed": "nbdistributed",
    "ray": "ray[train]",
}
"""By the package whose version is told: what pip is asked for. Versions are in constraints.txt."""


def install(folder: Path) -> Path:
    """Make the environment, unless it is there; returns its interpreter."""
    python = folder / "bin" / "python"
    done = folder / "installed.json"
    wanted = (_HERE / "constraints.txt").read_text()
    if done.exists() and json.loads(done.read_text()) == wanted:
        return python
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for requirement in REQUIREMENTS.values():
        print(f"Installing {requirement} into {folder}", file=sys.stderr)
        # One that cannot be installed is missing in the table, and the others are not.
        subprocess.run(
            [
                sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--quiet",
                "--disable-pip-version-check", "install", "--no-input",
                "--constraint", str(_HERE.parents[1] / "constraints.txt"),
                "--constraint", str(_HERE / "constraints.txt"), requirement,
            ],
            check=False,
        )  # fmt: skip
    done.write_text(json.dumps(wanted))
    return python


def versions(python: Path, packages: set[str]) -> dict[str, str]:
    """Return the versions of those packages that an interpreter has."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "def of(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: of(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", script, *sorted(packages)], capture_output=True, text=True, check=True
    )
    return {name: version for name, version in json.loads(done.stdout).items() if version}
