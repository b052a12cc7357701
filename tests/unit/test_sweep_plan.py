"""What a sweep's line means, what is planned for it, and how its rows are compared."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from IPython.core.error import UsageError

from dtkit.driver.trials.sweep import plan_sweep
from dtkit.errors import InvalidInputError
from dtkit.magics.tuning import SWEEP, TUNE, num_bytes, split_axes
from dtkit.recipe import Recipe
from dtkit.telemetry import History
from dtkit.views.sweeptable import compare
from dtkit.views.sweepview import sweep_bundle, sweep_text

if TYPE_CHECKING:
    from pathlib import Path


def history(losses: list[float], batch: float, step_ms: float) -> History:
    """Return a run of equal steps."""
    num = len(losses)
    steps = np.arange(1.0, num + 1)
    columns: dict[str, Any] = {
        "step": steps,
        "time_s": 3.0 + steps * step_ms / 1000,
        "loss": np.array(losses),
        "samples_per_s": np.full(num, 1000.0 * batch / step_ms),
        "step_ms": np.full(num, step_ms),
        "sent_bytes": np.full(num, 4000.0),
    }
    return History(columns)


def test_settings_with_several_values_are_axes() -> None:
    axes, base = split_axes(SWEEP.parse("--compress none,fp16 --batch-size 32,128 --batch global"))
    assert axes == {"batch_size": [32, 128], "compress": ["none", "fp16"]}
    assert base == Recipe(batch="global")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--compress fp16", "several values"),
        ("--batch-size 32,large", "--batch-size large: whole numbers"),
        ("--batchsize 32", "did you mean --batch-size"),
    ],
)
def test_a_line_that_sweeps_nothing_says_what_would(line: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        split_axes(SWEEP.parse(line))


@pytest.mark.parametrize(
    ("text", "expected"), [("500", 500), ("2k", 2048), ("1.5M", 1572864), ("2GiB", 2**31)]
)
def test_a_size_in_bytes(text: str, expected: int) -> None:
    assert num_bytes(text) == expected
    with pytest.raises(InvalidInputError, match="2G"):
        num_bytes(f"{text}!")


def test_what_to_tune_must_be_said() -> None:
    assert TUNE.parse("lr --low 1e-5").low == pytest.approx(1e-5)
    with pytest.raises(UsageError):
        TUNE.parse("momentum")


def test_every_combination_is_planned_and_senseless_ones_are_rows(tmp_path: Path) -> None:
    axes = {"manual": [False, True], "compress": ["none", "fp16"]}
    sweep = plan_sweep(axes, Recipe(), tmp_path, "s")
    assert [row.label for row in sweep.rows] == [
        "--manual False --compress none", "--manual False --compress fp16",
        "--manual True --compress none", "--manual True --compress fp16",
    ]  # fmt: skip
    assert [row.state for row in sweep.rows] == ["waiting"] * 3 + ["refused"]
    assert "--manual" in sweep.rows[-1].error
    sweep.write()
    written = json.loads(sweep.path.read_text())
    assert written["rows"][-1]["state"] == "refused"
    assert written["rows"][0]["loss"] is None
    assert plan_sweep(axes, Recipe(), tmp_path, "s").name == "s-2"


def test_rows_that_cannot_be_written_are_kept_and_it_is_said_once(tmp_path: Path) -> None:
    sweep = plan_sweep({"manual": [False, True]}, Recipe(), tmp_path / "sweeps", "s")
    (tmp_path / "sweeps").rmdir()
    sweep.write()
    sweep.write()
    (note,) = sweep.notes
    assert "s.sweep.json" in note
    assert "No such file" in note


@pytest.mark.parametrize("axes", [{}, {"no_such": [1]}, {"batch_size": []}])
def test_a_sweep_of_nothing_is_refused(axes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        plan_sweep(axes, Recipe(), tmp_path, None)


def test_losses_are_compared_at_equal_samples_and_at_equal_time() -> None:
    small = history([10.0, 8, 6, 5, 4, 3, 2.5, 2], batch=10, step_ms=10)  # 80 samples, 70 ms
    large = history([9.0, 7, 6, 5], batch=20, step_ms=15)  # 80 samples, 45 ms
    broken = history([9.0], batch=20, step_ms=15)
    one, two, failed, refused = compare(
        [
            ("a", "finished", "", small, 1.0),
            ("b", "finished", "", large, 2.0),
            ("c", "failed", "ranks 0, 1: ValueError: no", broken, 2.0),
            ("d", "refused", "no sense", None, math.nan),
        ]
    )
    assert (one.loss_at_samples, two.loss_at_samples) == (2, 5)
    assert (one.loss_at_time, two.loss_at_time) == (4, 5)
    assert one.equal_samples == pytest.approx(80)
    assert one.equal_s == pytest.approx(0.045)
    assert (one.samples_per_s, two.samples_per_s) == (pytest.approx(1000), pytest.approx(4000 / 3))
    assert math.isnan(failed.loss_at_samples)
    assert refused.num_steps == 0
    text = sweep_text("s", [one, two, failed, refused], ["a note"])
    assert "loss at 80 samples" in text
    assert "loss at 0.045 s" in text
    assert "✖ failed: ranks 0, 1: ValueError: no" in text
    bundle = sweep_bundle("s", [one, two], [("a", small), ("b <", large)], ["a <note>"])
    assert "alt=" in bundle["text/html"]
    assert "a &lt;note&gt;" in bundle["text/html"]


def test_a_small_last_batch_does_not_decide() -> None:
    run = history([3.0, 2.0, 2.0, 2.0], batch=60, step_ms=10)
    columns = dict(run) | {"loss": np.array([3.0, 2.0, 2.0, 9.0])}
    columns["samples_per_s"] = np.array([6000.0, 6000.0, 6000.0, 200.0])
    (one,) = compare([("a", "finished", "", History(columns), 1.0)])
    # 18.2 samples: the last batch's 2, and the 60 before them.
    assert one.loss == pytest.approx((2 * 9 + 60 * 2) / 62)
