"""Runs read back from disk: whole ones, killed ones, ones of another version."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dtkit.driver.runs.archive import load, runs
from dtkit.driver.runs.create import create_run
from dtkit.driver.runs.run import Run
from dtkit.errors import InvalidInputError
from dtkit.events import STEP_COLUMNS, LogBatch, RankEnded, RankStarted, StepBatch, encode
from dtkit.options import RunOptions
from dtkit.recipe import Recipe


def make_run(folder: Path, name: str, batch: str = "rank") -> Run:
    return create_run(
        folder, "x = 1\n", recipe=Recipe(batch=batch), options=RunOptions(), ranks=(0, 1),
        name=name, environment={"torch": "2.13.0"},
    )  # fmt: skip


def steps_of(rank: int, first: int, last: int) -> StepBatch:
    step = np.arange(first, last + 1, dtype=float)
    columns = {column: (0 * step).tolist() for column in STEP_COLUMNS}
    columns["step"], columns["time_s"] = step.tolist(), (0.01 * step).tolist()
    columns["loss"] = (1 / step + rank).tolist()
    columns["samples"], columns["step_ms"] = (0 * step + 8).tolist(), (0 * step + 10).tolist()
    return StepBatch(rank, columns, peak_bytes=2**30)


def write_events(run: Run, rank: int, num_steps: int, *, is_whole: bool = True) -> None:
    """Write what a rank would: its steps in batches of 1,000, and its end."""
    events: list[Any] = [RankStarted(rank, 1, "here", "cpu", run.start_unix_s)]
    events += [
        steps_of(rank, first, min(first + 999, num_steps))
        for first in range(1, num_steps + 1, 1000)
    ]
    events.append(LogBatch(rank, [num_steps], [0.01 * num_steps], [{"accuracy": 0.5}]))
    if is_whole:
        events.append(RankEnded(rank, "finished", num_steps, 0.01 * num_steps))
    data = b"".join(encode(event) + b"\n" for event in events)
    if not is_whole:
        data += encode(steps_of(rank, num_steps + 1, num_steps + 2))[:40]
    (run.dir / f"rank-{rank}.jsonl").write_bytes(data)


def forget_kernel(run: Run) -> None:
    """Make the run one of a kernel that was killed while it went on."""
    facts = json.loads((run.dir / "run.json").read_text())
    facts["driver"]["start_unix_s"] -= 3600
    (run.dir / "run.json").write_text(json.dumps(facts))


def test_a_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    for rank in run.ranks:
        write_events(run, rank, 3)
    run.note("something was done")
    run.end("finished")
    again = load(run.dir)
    assert (again.name, again.state, again.error) == ("a", "finished", None)
    assert (again.recipe, again.options, again.cell) == (run.recipe, run.options, "x = 1\n")
    assert again.environment == {"torch": "2.13.0"}
    assert again.notes == ("something was done",)
    np.testing.assert_allclose(again.history["loss"], [1.5, 1.0, 1 / 3 + 0.5])
    assert again.history["accuracy"][-1] == 0.5
    assert "finished" in again._repr_mimebundle_()["text/plain"]  # type: ignore[operator]
    assert Run.load(run.dir).name == "a"


@pytest.mark.parametrize("text", ["{", "3", '{"ranks": null}'])
def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "whole").end("finished")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(text)
    assert list(runs(tmp_path)) == ["whole"]
    with pytest.raises(InvalidInputError, match="broken holds no run that can be read"):
        runs(tmp_path)["broken"]


def test_where_nothing_can_be_stored_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InvalidInputError, match="names another folder"):
        create_run(
            tmp_path / "taken", "", recipe=Recipe(), options=RunOptions(), ranks=(0,), name="run"
        )


def test_a_disk_that_is_full_when_a_run_begins_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _text: str) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InvalidInputError, match=r"No space left .* names another folder"):
        create_run(tmp_path, "", recipe=Recipe(), options=RunOptions(), ranks=(0,), name="run")


def test_a_long_run_is_merged_rank_by_rank_as_it_once_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, "long")
    for rank in run.ranks:
        write_events(run, rank, 20_000)
    run.end("finished")
    loss = load(run.dir).history["loss"]
    assert len(loss) == 20_000
    np.testing.assert_allclose(loss, 1 / np.arange(1, 20_001) + 0.5)


def test_a_killed_kernel_leaves_a_run_with_its_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path, "killed")
    for rank in run.ranks:
        write_events(run, rank, 3, is_whole=False)
    forget_kernel(run)
    again = load(run.dir)
    assert again.state == "failed"
    assert "before it ended" in str(again.error)
    assert again.history.num_steps == 3
    for rank in run.ranks:
        write_events(run, rank, 3)
    assert load(run.dir).state == "finished"  # the ranks got to the end without their kernel


def test_a_run_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "other")
    write_events(run, 0, 2)
    write_events(run, 1, 2)
    with (run.dir / "rank-0.jsonl").open("ab") as file:
        file.write(b'{"event":"FromTheFuture","rank":0}\n')
    run.end("finished")
    facts = json.loads((run.dir / "run.json").read_text())
    facts["recipe"]["novelty"] = 3
    facts["novelty"] = 4
    del facts["options"]
    (run.dir / "run.json").write_text(json.dumps(facts))
    assert load(run.dir).history.num_steps == 2


def test_runs_are_listed_newest_first_compared_and_deleted(tmp_path: Path) -> None:
    for name, batch, num_steps in (("a", "rank", 3), ("b", "global", 4)):
        run = make_run(tmp_path, name, batch)
        for rank in run.ranks:
            write_events(run, rank, num_steps)
        run.end("finished")
    found = runs(tmp_path)
    assert list(found) == ["b", "a"]
    assert found["b"].recipe.batch == "global"
    table = found._repr_mimebundle_()
    assert "--batch global" in table["text/plain"]
    assert "<td" in table["text/html"]
    comparison = found.compare("a", "b")
    assert comparison.differences == {"batch": ("rank", "global")}
    assert comparison.results["b"]["steps"] == "4"
    assert comparison.results["a"]["samples/s"] == "1,600"
    shown = comparison._repr_mimebundle_()
    assert "<img" in shown["text/html"]
    assert "batch" in shown["text/plain"]
    found.delete("a")
    assert list(found) == ["b"]


def test_a_name_that_is_not_there_names_one_that_is(tmp_path: Path) -> None:
    make_run(tmp_path, "first_run").end("finished")
    with pytest.raises(InvalidInputError, match="did you mean first_run"):
        runs(tmp_path)["first_rum"]
    with pytest.raises(InvalidInputError, match="no run"):
        runs(tmp_path).delete("first_run", "other")
    assert list(runs(tmp_path)) == ["first_run"]
    with pytest.raises(InvalidInputError, match="holds no run"):
        load(tmp_path)


def test_a_run_that_goes_on_is_not_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path, "going")
    with pytest.raises(InvalidInputError, match="goes on"):
        runs(tmp_path).delete("going")
    facts = json.loads((run.dir / "run.json").read_text())
    assert facts["driver"]["pid"] == os.getpid()
    assert facts["driver"]["start_unix_s"] == psutil.Process().create_time()
    forget_kernel(run)
    runs(tmp_path).delete("going")
    assert len(runs(tmp_path)) == 0


def test_the_list_says_how_far_a_run_is_that_another_kernel_drives(tmp_path: Path) -> None:
    run = make_run(tmp_path, "going")
    (facts,) = runs(tmp_path).facts()
    assert (facts.state, facts.num_steps) == ("running", 0)
    write_events(run, 0, 1200, is_whole=False)
    write_events(run, 1, 1100, is_whole=False)
    (facts,) = runs(tmp_path).facts()
    assert (facts.state, facts.num_steps) == ("running", 1100)  # both ranks have made so many
    assert facts.elapsed_s > 0
    forget_kernel(run)
    assert [f.state for f in runs(tmp_path).facts()] == ["failed"]
    for rank in run.ranks:
        write_events(run, rank, 1200)
    (facts,) = runs(tmp_path).facts()
    assert (facts.state, facts.num_steps) == ("finished", 1200)
