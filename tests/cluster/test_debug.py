"""With --debug, collectives that do not match are an error on every rank; the session goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

MISMATCH = """
x = torch.ones(4)
if rank == 0:
    dist.all_reduce(x)
else:
    dist.broadcast(x, src=0)
"""
SHAPES = "dist.all_reduce(torch.ones(2 + rank))"
LEVEL = "str(dist.get_debug_level())"


@pytest.mark.parametrize("cell", [MISMATCH, SHAPES], ids=["operation", "shape"])
def test_a_mismatch_is_named_on_every_rank(rig2: Rig, cell: str) -> None:
    with pytest.raises(RankError, match="mismatch between collectives") as caught:
        rig2.session.train(cell, options=RunOptions(debug=True))
    # A rank that was cut off before it had compared says so, and is folded.
    for cause in caught.value.causes:
        assert "Rank 0 is running collective" in cause.evalue
        assert "Rank 1 is running collective" in cause.evalue
    # Afterwards the group is an ordinary one again, and it works.
    assert "OFF" in rig2.common(LEVEL)
    rig2.session.execute("x = torch.ones(1); dist.all_reduce(x); assert x == world_size")
