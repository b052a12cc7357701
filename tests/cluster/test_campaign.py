"""A short campaign of random faults, in CI; `make campaign N=200` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_FAULTS = 12


@pytest.mark.timeout(300)
def test_a_short_campaign_is_survived() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/campaign", "--num", str(NUM_FAULTS), "--seed", "7"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert f"{NUM_FAULTS} faults on 3 ranks" in said
    # What engines grew is told, not judged: so few faults are no trend.
    assert f"{NUM_FAULTS} detected, {NUM_FAULTS} with state kept, 0 hung, 0 orphans" in said, said
