"""How soon ranks that wait in a collective are freed when another one raises."""

from __future__ import annotations

import ast
import contextlib

import dtkit
from benchmarks.result import Result, Settings, Spread
from dtkit.errors import RankError

__all__ = ["release"]

_SETUP = "import time\nimport torch\nraised_s = freed_s = None"
_CELL = """\
dist.barrier()
if rank == 1:
    raised_s = time.time()
    raise ValueError('the first to fail')
try:
    dist.all_reduce(torch.ones(1))
finally:
    freed_s = time.time()
"""


def release(settings: Settings) -> list[Result]:
    """Measure from the statement that raises on one rank to the last other rank's exception."""
    return [_measure(settings, num_ranks) for num_ranks in (2, 4, 8)]


def _measure(settings: Settings, num_ranks: int) -> Result:
    num_rounds = settings.pick(60, 10)
    with dtkit.Session.start(num_ranks, devices="cpu", runs_dir=settings.folder) as session:
        session.execute(_SETUP)
        _delay_ms(session)  # whatever is loaded once
        delays_ms = [_delay_ms(session) for _ in range(num_rounds)]
    return Result(
        name=f"release_{num_ranks}",
        what=f"from a rank's `raise` to the exception on the last of the {num_ranks - 1} that "
        "wait for it in an all_reduce, on gloo",
        spread=Spread.of(delays_ms),
        unit="ms",
        goal=100.0,
        num_steps=num_rounds,
        command="the ranks' own clocks, which are one on a host",
        held_back_by="20 ms of it are waited on purpose, since ranks often fail all alike; the "
        "rest is two messages through ipyparallel and the turns of busy cores",
        details={"worst of all": f"{max(delays_ms):.0f} ms"},
    )


def _delay_ms(session: dtkit.Session) -> float:
    with contextlib.suppress(RankError):
        session.execute(_CELL)
    answers = session.execute("raised_s, freed_s").results
    times = {rank: ast.literal_eval(text) for rank, text in answers.items()}
    raised_s = float(times.pop(1)[0])
    return 1000 * (max(float(freed_s) for _, freed_s in times.values()) - raised_s)
