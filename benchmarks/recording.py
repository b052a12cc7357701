"""What recording costs a step: hooks, marks and the thread that sends them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING

from benchmarks.cells import recorded_block
from benchmarks.processes import Notebook
from benchmarks.result import Result, Settings, Spread

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["recording"]

_NUM_CHUNKS, _CHUNK = 40, 50
_START = "%load_ext dtkit\n%dist_init -n 1 --devices cpu"


@dataclass(frozen=True, slots=True)
class _Block:
    """Microseconds per step: median over chunks, mean, CPU of the training thread and of all."""

    median_us: float
    mean_us: float
    thread_us: float
    process_us: float


def recording(settings: Settings) -> list[Result]:
    """Measure trivial steps in a run and outside of one, in turn, on one engine.

    One rank: then nothing is distributed, and what a run adds is the recording.
    """
    num_rounds = settings.pick(30, 6)
    folder = settings.folder / "recording"
    folder.mkdir()
    blocks: dict[str, list[_Block]] = {"dist_train": [], "dist": []}
    with Notebook(folder, DTKIT_UI="off") as notebook:
        notebook.run(_START)
        for i in range(num_rounds + 1):
            for magic in ("dist_train", "dist") if i % 2 else ("dist", "dist_train"):
                block = _measure(notebook, magic, folder / "times.json")
                if i:
                    blocks[magic].append(block)
    cost = {
        name: Spread.of([
            getattr(a, name) - getattr(b, name)
            for a, b in zip(blocks["dist_train"], blocks["dist"], strict=True)
        ])
        for name in _Block.__slots__
    }  # fmt: skip
    return [
        Result(
            name="recording",
            what="time that a recorded step takes longer than one outside of a run; median chunk "
            f"of {_CHUNK} in each block of {_NUM_CHUNKS * _CHUNK}",
            spread=cost["median_us"],
            unit="µs",
            goal=10.0,
            num_steps=num_rounds * _NUM_CHUNKS * _CHUNK,
            command="the same text in a %%dist cell",
            held_back_by="calls in Python: three patched functions and two optimizer hooks a step",
            details={
                "by the mean": f"{cost['mean_us']} µs",
                "CPU time of the training thread": f"{cost['thread_us']} µs",
                "CPU time of the whole engine": f"{cost['process_us']} µs",
                "a step without": f"{median(b.median_us for b in blocks['dist']):.0f} µs",
            },
        )
    ]


def _measure(notebook: Notebook, magic: str, out: Path) -> _Block:
    cell = recorded_block(num_chunks=_NUM_CHUNKS, chunk=_CHUNK, out=out)
    notebook.run(f"%%{magic}\n{cell}")
    facts = json.loads(out.read_text())
    num_steps = _NUM_CHUNKS * _CHUNK
    return _Block(
        1e6 * median(facts["times_s"]) / _CHUNK,
        1e6 * mean(facts["times_s"]) / _CHUNK,
        1e6 * facts["thread_s"] / num_steps,
        1e6 * facts["cpu_s"] / num_steps,
    )
