"""What a cell costs that does nothing: `%%dist` against ipyparallel's own `execute`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.processes import Notebook
from benchmarks.result import Result, Settings, paired, typical

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONNECT", "START", "noop"]

START = "%load_ext dtkit\n%dist_init -n 2 --devices cpu"

CONNECT = """\
import json, time
import dtkit
import ipyparallel as ipp
session = dtkit.current_session()
client = ipp.Client(profile_dir=str(session._cluster.dir), cluster_id="")
view = client[:]
"""
"""A client of its own on the same engines, as somebody without dtkit would have."""

_ROUNDS = """\
pairs = []
for i in range({num_rounds}):
    begun = time.perf_counter()
    await get_ipython().dtkit_run_cell("dist", "", "pass\\n")
    between = time.perf_counter()
    view.execute("pass", block=True)
    pairs.append((between - begun, time.perf_counter() - between))
with open({out!r}, "w") as file:
    json.dump(pairs, file)
"""


def noop(settings: Settings) -> list[Result]:
    """Measure `%%dist` with `pass`, and `view.execute("pass")`, in turn in one kernel."""
    num_rounds = settings.pick(200, 30)
    folder = settings.folder / "noop"
    folder.mkdir()
    with Notebook(folder) as notebook:
        notebook.run(START)
        notebook.run(CONNECT)
        _measure(notebook, folder / "warm.json", 10)
        pairs = _measure(notebook, folder / "noop.json", num_rounds)
        notebook.run("client.close()")
    ours, theirs = zip(*pairs, strict=True)
    return [
        Result(
            name="noop",
            what="a %%dist cell with `pass` on two ranks / view.execute('pass', block=True)",
            spread=paired(ours, theirs),
            unit="×",
            goal=1.2,
            num_steps=num_rounds,
            command="ipyparallel.Client(...)[:].execute('pass', block=True), same engines",
            held_back_by="how soon the driver looks again whether the cell has ended",
            details={"dtkit": typical(ours, "ms", 1e3), "ipyparallel": typical(theirs, "ms", 1e3)},
        )
    ]


def _measure(notebook: Notebook, out: Path, num_rounds: int) -> list[tuple[float, float]]:
    notebook.run(_ROUNDS.format(num_rounds=num_rounds, out=str(out)))
    pairs: list[tuple[float, float]] = json.loads(out.read_text())
    return pairs
