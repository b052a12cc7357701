"""Raise and Stop inside an NCCL collective; run where there are two GPUs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import dtkit
from dtkit.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

STUCK = "dist.all_reduce(torch.ones(1, device=device)) if rank == 0 else time.sleep(60)"
SUM = "total = torch.ones(1, device=device)\ndist.all_reduce(total)\nint(total), kept"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dtkit.Session]:
    """Two ranks on two GPUs over NCCL."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with dtkit.Session.start(2, backend="nccl", runs_dir=tmp_path_factory.mktemp("runs")) as opened:
        opened.execute("import time, torch\nkept = rank")
        yield opened


def test_a_raise_frees_a_rank_in_an_nccl_collective(session: dtkit.Session) -> None:
    cell = (
        "if rank == 1: raise ValueError('boom')\n"
        "x = torch.ones(1, device=device)\ndist.all_reduce(x)\nx.item()"
    )
    with pytest.raises(RankError, match="boom") as caught:
        session.execute(cell)
    assert "group rebuilt; state kept" in caught.value.epilogue
    assert session.execute(SUM).results == {0: "(2, 0)", 1: "(2, 1)"}


def test_stop_now_ends_an_nccl_collective(session: dtkit.Session) -> None:
    _, requests, steps = session.running(f"{STUCK}\ntorch.cuda.synchronize()")
    next(steps)
    while any(place["state"] == "idle" for place in session._engines.control("where").values()):
        next(steps)
    requests.stop_now()
    for _ in steps:
        threading.Event().wait(0.01)
    assert session.execute(SUM).results == {0: "(2, 0)", 1: "(2, 1)"}
