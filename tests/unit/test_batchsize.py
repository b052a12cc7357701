"""Where a batch stands against the gradient noise scale."""

from __future__ import annotations

import math

import pytest

from dtkit.batchsize import place_batch


@pytest.mark.parametrize(
    ("batch", "zone", "proposed"),
    [
        (16, "small", 64),
        (24, "small", 96),
        (25, "medium", 25),
        (100, "medium", 100),
        (400, "medium", 400),
        (512, "large", 64),
        (1, "small", 64),
    ],
)
def test_the_zone_and_the_proposal(batch: int, zone: str, proposed: int) -> None:
    placed = place_batch(100.0, batch)
    assert (placed.zone, placed.proposed) == (zone, proposed)


def test_the_learning_rate_is_scaled_by_the_rule_of_the_optimizer() -> None:
    linear = place_batch(1600.0, 100, lr=0.1, optimizer="SGD")
    root = place_batch(1600.0, 100, lr=0.1, optimizer="AdamW")
    assert (linear.lr, linear.rule) == (pytest.approx(1.6), "linear")
    assert (root.lr, root.rule) == (pytest.approx(0.4), "square root")
    assert "learning rate 1.6 (linear scaling with a warm-up)" in str(linear)
    assert "learning rate 0.4 (square root scaling)" in str(root)


def test_what_the_proposal_costs() -> None:
    placed = place_batch(1600.0, 100)
    # 1 + 16 parts of steps become 1 + 1; 1 + 1/16 of samples become 2.
    assert placed.steps_ratio == pytest.approx(2 / 17)
    assert placed.samples_ratio == pytest.approx(2 * 16 / 17)
    assert "batch of 100 is small for a gradient noise scale of about 1,600" in str(placed)
    assert "learning rate" not in str(placed)
    assert math.isnan(placed.lr)


def test_nothing_is_proposed_in_place_of_a_medium_batch() -> None:
    assert "To try" not in str(place_batch(90.0, 100, lr=0.1))
