"""Event files read back with TensorBoard's own reader; the addresses that a browser is given."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from dtkit.driver.runs.create import create_run
from dtkit.events import STEP_COLUMNS, LogBatch, StepBatch
from dtkit.options import RunOptions
from dtkit.recipe import Recipe
from dtkit.tensorboard.server import address
from dtkit.tensorboard.writer import MAX_POINTS_PER_ROUND, TensorBoardWriter, tag_of

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.driver.runs.run import Run


def make_run(folder: Path, tensorboard: str | None = "") -> Run:
    return create_run(
        folder, "", recipe=Recipe(batch="global"), options=RunOptions(tensorboard=tensorboard),
        ranks=(0, 1), name="a",
    )  # fmt: skip


def feed(run: Run, first: int, last: int) -> None:
    """Let both ranks make steps, and log a metric in each."""
    step = np.arange(first, last + 1, dtype=float)
    for rank in run.ranks:
        columns = {column: (0 * step).tolist() for column in STEP_COLUMNS}
        columns |= {"step": step.tolist(), "time_s": (0.01 * step).tolist()}
        columns |= {"loss": (1 / step + rank).tolist(), "lr": (0 * step + 0.1).tolist()}
        columns |= {"samples": (0 * step + 8).tolist(), "step_ms": (0 * step + 10).tolist()}
        run.replay(StepBatch(rank, columns, peak_bytes=2**30 * (rank + 1)))
        metrics = [{"accuracy": rank / 1.0, "grad_norm": 3.0} for _ in step]
        run.replay(LogBatch(rank, step.astype(int).tolist(), (0.01 * step).tolist(), metrics))


def read(folder: Path) -> EventAccumulator:
    (path,) = folder.glob("events.out.tfevents.*")  # one file: one curve
    reader = EventAccumulator(str(path), size_guidance={"scalars": 0})
    reader.Reload()
    return reader


def curve(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in reader.Scalars(tag)]


def test_a_run_is_written_while_it_goes_on_and_whole_at_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    feed(run, 1, 3)
    run.end("finished")
    reader = read(run.dir / "tensorboard")
    loss = curve(reader, "train/loss")
    assert [step for step, _ in loss] == [1, 2, 3]
    np.testing.assert_allclose([v for _, v in loss], [1.5, 1.0, 1 / 3 + 0.5], rtol=1e-6)
    assert curve(reader, "train/grad_norm") == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert curve(reader, "metrics/accuracy")[-1] == (3, 0.5)
    assert curve(reader, "speed/samples_per_s")[0] == (1, 1600.0)
    assert curve(reader, "memory/peak_gib_rank1") == [(3, 2.0)]
    assert {"train/lr", "time/step_ms", "time/data_ms", "time/comm_ms"} <= set(
        reader.Tags()["scalars"]
    )
    at = reader.Scalars("train/loss")[1].wall_time - run.start_unix_s
    assert at == pytest.approx(0.02)


def test_nothing_is_written_twice_and_metrics_wait_for_all_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path, tensorboard=None)
    writer = TensorBoardWriter(run.news, tmp_path / "tb", run.start_unix_s, {})
    feed(run, 1, 3)
    writer.write_new()
    assert "metrics/accuracy" not in read(tmp_path / "tb").Tags()["scalars"]
    assert len(curve(read(tmp_path / "tb"), "train/loss")) == 3
    feed(run, 4, 5)
    writer.write_new()
    assert [s for s, _ in curve(read(tmp_path / "tb"), "metrics/accuracy")] == [1, 2, 3]
    writer.close("finished", run.start_unix_s + 1)
    reader = read(tmp_path / "tb")
    assert [s for s, _ in curve(reader, "metrics/accuracy")] == [1, 2, 3, 4, 5]
    assert [s for s, _ in curve(reader, "train/loss")] == [1, 2, 3, 4, 5]


def test_a_fast_run_is_thinned_out_to_its_last_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    feed(run, 1, 4 * MAX_POINTS_PER_ROUND)
    run.end("finished")
    steps = [s for s, _ in curve(read(run.dir / "tensorboard"), "train/loss")]
    assert len(steps) <= MAX_POINTS_PER_ROUND
    assert (steps[0], steps[-1]) == (1, 4 * MAX_POINTS_PER_ROUND)


def test_the_recipe_is_there_as_hparams(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    feed(run, 1, 2)
    run.end("failed")
    plugin = read(run.dir / "tensorboard").SummaryMetadata
    start = hparams(plugin("_hparams_/session_start_info")).session_start_info
    assert start.hparams["batch"].string_value == "global"
    assert start.hparams["manual"].bool_value is False
    assert start.hparams["ranks"].number_value == 2
    experiment = hparams(plugin("_hparams_/experiment")).experiment
    assert {"batch", "ranks"} <= {info.name for info in experiment.hparam_infos}
    assert hparams(plugin("_hparams_/session_end_info")).session_end_info.status == 2  # failure


def hparams(found: Any) -> Any:
    return plugin_data_pb2.HParamsPluginData.FromString(found.plugin_data.content)


def test_a_folder_of_its_own_gets_one_folder_per_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", tensorboard=str(tmp_path / "logs"))
    feed(run, 1, 2)
    run.end("finished")
    assert len(curve(read(tmp_path / "logs/a"), "train/loss")) == 2


def test_a_run_is_written_afterwards(tmp_path: Path) -> None:
    run = make_run(tmp_path, tensorboard=None)
    feed(run, 1, 2)
    run.end("finished")
    assert not (run.dir / "tensorboard").exists()
    assert len(curve(read(run.write_tensorboard()), "train/loss")) == 2


def test_a_folder_that_cannot_be_written_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = make_run(tmp_path / "runs", tensorboard=str(tmp_path / "file"))
    feed(run, 1, 2)
    run.end("finished")
    assert run.state == "finished"
    assert any("TensorBoard" in note for note in run.notes)


def test_tags_are_grouped() -> None:
    assert tag_of("sent_bytes") == "bytes/sent_bytes"
    assert tag_of("noise_scale", is_logged=True) == "train/noise_scale"


def test_the_address_honours_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address(6006, {}) == "http://127.0.0.1:6006/"
    proxy = {"TENSORBOARD_PROXY_URL": "/somewhere/proxy/%PORT%/"}
    assert address(6006, proxy) == "/somewhere/proxy/6006/"
    hub = {"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert address(6006, hub) == "http://127.0.0.1:6006/"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    assert address(6006, hub) == "/user/me/proxy/6006/"
    assert address(6006, {**hub, **proxy}) == "/somewhere/proxy/6006/"
