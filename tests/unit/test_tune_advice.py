"""The search of a batch and of a learning rate, on trials that never were."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest

from dtkit.driver.trials.tune import BatchTuning, LrTuning, TuneSettings
from dtkit.errors import InvalidInputError
from dtkit.recipe import Recipe
from dtkit.telemetry import History

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@dataclass
class FakeRun:
    """What tuning looks at of a run."""

    history: History
    error: Exception | None = None
    state: str = "stopped"
    notes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (0, 1)
    peak_gib: float = 1.0

    def view(self) -> FakeRun:
        return self


@dataclass
class FakeTrials:
    """Runs that a function makes up."""

    make: Callable[[Recipe, Any], FakeRun]
    notes: list[str] = field(default_factory=list)
    num_left: int = 100
    tried: list[int | None] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def is_stopped(self) -> bool:
        return self.num_left <= 0

    def run(self, recipe: Recipe, options: Any, name: str) -> Generator[None, None, FakeRun]:
        assert name.startswith("tune-")
        self.num_left -= 1
        self.tried.append(recipe.batch_size)
        yield
        return self.make(recipe, options)


def steps(num: int, batch: float, step_ms: float, loss: Any = 1.0, lr: Any = 0.1) -> History:
    ones = np.ones(num)
    return History(
        {
            "step": np.arange(1.0, num + 1),
            "samples_per_s": ones * 1000 * batch / step_ms,
            "step_ms": ones * step_ms,
            "loss": ones * loss,
            "lr": ones * lr,
        }
    )


def searched(trials: FakeTrials, settings: TuneSettings | None = None) -> BatchTuning:
    tuning = BatchTuning(Recipe(), settings or TuneSettings())
    for _ in tuning.search(trials):  # type: ignore[arg-type]
        pass
    return tuning


def device(limit: int) -> Callable[[Recipe, Any], FakeRun]:
    """Return a device that holds `limit` samples, and is busy from 64 on."""

    def make(recipe: Recipe, options: Any) -> FakeRun:
        size = recipe.batch_size
        assert size is not None
        if size > limit:
            error = RuntimeError("rank 1: OutOfMemoryError: CUDA out of memory. Tried to …")
            return FakeRun(steps(0, 1, 1), error, "failed")
        return FakeRun(steps(options.max_steps, 2 * size, max(10.0, size / 6.4)))

    return make


@pytest.mark.parametrize(("limit", "largest"), [(1000, 960), (64, 64), (9, 9), (8, 8)])
def test_the_largest_batch_that_fits(limit: int, largest: int) -> None:
    tuning = searched(FakeTrials(device(limit)))
    assert tuning.largest == largest
    assert {t.state for t in tuning.trials} == {"fits", "out of memory"}
    assert [t.batch_size for t in tuning.trials] == sorted(t.batch_size for t in tuning.trials)


def test_the_knee_is_the_smallest_that_is_nearly_as_fast() -> None:
    tuning = searched(FakeTrials(device(1000)))
    assert tuning.knee == 64
    assert "batch_size=64 is as fast as it gets within 10%" in repr(tuning)
    bundle = tuning._repr_mimebundle_()
    assert "alt=" in bundle["text/html"]
    assert "out of memory" in bundle["text/plain"]


def test_one_quick_step_does_not_make_a_batch_the_fastest() -> None:
    def make(recipe: Recipe, options: Any) -> FakeRun:
        # One epoch of 1000 samples over two ranks: 128 and more are timed by one step, or none.
        size = recipe.batch_size
        assert size is not None
        num = min(options.max_steps, 1000 // (2 * size))
        return FakeRun(steps(num, 2 * size, 10.0 if size <= 64 else 1.0))

    tuning = searched(FakeTrials(make))
    assert tuning.largest == 256
    assert tuning.knee == 64
    assert [note for note in tuning.notes if note.startswith("samples/s of 128, 256: ")]


def test_nothing_fits_and_it_is_said() -> None:
    tuning = searched(FakeTrials(device(4)))
    assert (tuning.largest, tuning.knee) == (None, None)
    assert "out of memory" in tuning.proposal()


def test_a_stop_keeps_what_was_found() -> None:
    trials = FakeTrials(device(1000), num_left=3)
    tuning = searched(trials)
    assert trials.tried == [8, 16, 32]
    # The one that was stopped says nothing of its size.
    assert [t.batch_size for t in tuning.trials] == [8, 16]
    assert any("stopped" in note for note in tuning.notes)


def test_a_batch_that_was_not_had_is_none() -> None:
    def fewer(recipe: Recipe, _options: Any) -> FakeRun:
        return FakeRun(steps(5, min(2 * (recipe.batch_size or 0), 100), 10))

    tuning = searched(FakeTrials(fewer))
    assert tuning.largest == 32
    assert tuning.trials[-1].state == "more than the data"

    def unchanged(_recipe: Recipe, _options: Any) -> FakeRun:
        return FakeRun(steps(5, 1, 1), notes=("batch size 8 changed nothing: no DataLoader …",))

    assert "changed nothing" in searched(FakeTrials(unchanged)).proposal()


def curve(num: int) -> tuple[Any, Any]:
    lr = np.geomspace(1e-4, 10, num)
    falls = 2.0 - 1.5 / (1 + np.exp(-4 * np.log(lr / 0.05)))
    return lr, np.where(lr > 2, 50.0, falls)


def test_where_the_loss_falls_fastest_and_where_it_is_lost() -> None:
    def make(_recipe: Recipe, options: Any) -> FakeRun:
        assert options.lr_range == (1e-4, 10)
        lr, loss = curve(options.max_steps)
        return FakeRun(steps(options.max_steps, 8, 1, loss, lr))

    tuning = LrTuning(Recipe(), TuneSettings(low=1e-4, high=10))
    for _ in tuning.search(FakeTrials(make)):  # type: ignore[arg-type]
        pass
    assert tuning.steepest == pytest.approx(0.05, rel=0.3)
    assert tuning.diverges == pytest.approx(2, rel=0.4)
    assert "alt=" in tuning._repr_mimebundle_()["text/html"]
    assert "it is lost" in repr(tuning)


def test_a_cell_of_few_steps_goes_through_the_range_in_these() -> None:
    asked = []

    def make(_recipe: Recipe, options: Any) -> FakeRun:
        asked.append(options.max_steps)
        num = min(30, options.max_steps)
        state = "finished" if options.max_steps > num else "stopped"
        return FakeRun(steps(num, 8, 1, *curve(num)[::-1]), state=state)

    tuning = LrTuning(Recipe(), TuneSettings())
    for _ in tuning.search(FakeTrials(make)):  # type: ignore[arg-type]
        pass
    assert asked == [100, 30]
    assert len(tuning.lr) == 30
    assert any("30 steps" in note for note in tuning.notes)


def test_a_loss_that_never_falls_gives_no_rate() -> None:
    tuning = LrTuning(Recipe(), TuneSettings())
    tuning.lr, tuning.loss = np.geomspace(1e-4, 1, 20), np.linspace(1, 2, 20)
    assert math.isnan(tuning.steepest)
    assert "no learning rate" in tuning.proposal()


@pytest.mark.parametrize(
    "settings", [{"num_steps": 2}, {"first_batch": 9, "most_batch": 8}, {"low": 1.0, "high": 0.1}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        TuneSettings(**settings)
