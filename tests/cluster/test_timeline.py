"""Timelines of real runs: what was planted is found, with its size."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_trace_files import assert_valid, named

from dtkit.errors import RankError
from dtkit.options import RunOptions
from dtkit.trace.advice import advise
from dtkit.trace.analysis import Analysis, analyse
from dtkit.trace.rows import read_run

if TYPE_CHECKING:
    from rig import Rig

    from dtkit.driver.runs.run import Run

LOOP = """
import time
took_s = 0.0
def pause(seconds):
    # The workload: something slow. It counts for itself how slow it was.
    global took_s
    begun = time.perf_counter()
    time.sleep(seconds)
    took_s += time.perf_counter() - begun
class Stored(torch.utils.data.Dataset):
    def __len__(self):
        return 256
    def __getitem__(self, i):
        IN_DATA
        return X[i], y[i]
torch.manual_seed(0)
loader = DataLoader(Stored(), batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for xb, yb in loader:
    optimizer.zero_grad()
    loss = cross_entropy(model(xb), yb)
    IN_FORWARD
    loss.backward()
    optimizer.step()
num_steps = 16
"""
SLOW_LINK = """
import threading, time
from torch.futures import Future
real_all_reduce = dist.all_reduce
class Slow(dist.Work):
    def __init__(self, work):
        super().__init__()
        self.future = Future()
        def finish():
            work.wait()
            begun = time.perf_counter()
            time.sleep(0.03)  # the workload: a link that is slow
            link_ms.append(1000 * (time.perf_counter() - begun))
            self.future.set_result(None)
        threading.Thread(target=finish).start()
    def wait(self, *args):
        self.future.wait()
        return True
    def get_future(self):
        return self.future
def slow_all_reduce(*args, async_op=False, **kwargs):
    work = Slow(real_all_reduce(*args, async_op=True, **kwargs))
    return work if async_op else work.wait()
link_ms = []
dist.all_reduce = slow_all_reduce
"""


def train(rig: Rig, in_data: str = "pass", in_forward: str = "pass", steps: int = 200) -> Run:
    cell = LOOP.replace("IN_DATA", in_data).replace("IN_FORWARD", in_forward)
    return rig.session.train(cell, options=RunOptions(timeline="", timeline_steps=steps))


def analysis_of(run: Run) -> Analysis:
    found = analyse(read_run(run.dir))
    assert found is not None
    return found


def test_the_trace_has_every_step_of_every_rank(rig2: Rig) -> None:
    run = train(rig2)
    trace = json.loads((run.dir / "timeline.json").read_text())
    assert_valid(trace)
    assert len(named(trace, "step 16")) == 2
    for phase in ("data", "forward", "backward", "optimizer"):
        assert len(named(trace, phase)) == 2 * 16
    names = {
        e["args"]["name"]: e["pid"] for e in named(trace, "process_name") if "name" in e["args"]
    }
    for tensor in ("allreduce.0.weight", "allreduce.0.bias", "allreduce.2.weight"):
        for event in ("NEGOTIATE_ALLREDUCE", "ALLREDUCE", "GLOO_ALLREDUCE"):
            of_tensor = [e for e in named(trace, event) if e["pid"] == names[tensor]]
            assert len(of_tensor) == 16, (tensor, event)
    assert trace["otherData"]["error_us"] == 0  # one host, one clock


def test_only_the_last_steps_are_kept_and_marked_when_asked(rig2: Rig) -> None:
    cell = LOOP.replace("IN_DATA", "pass").replace("IN_FORWARD", "pass")
    options = RunOptions(timeline="", timeline_steps=5, timeline_mark_cycles=True)
    run = rig2.session.train(cell, options=options)
    trace = json.loads((run.dir / "timeline.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if e.get("name", "").startswith("step ")}
    assert steps == {f"step {i}" for i in range(12, 17)}
    assert len(named(trace, "CYCLE_START")) == 2 * 5


def test_a_whole_run_is_compressed(rig2: Rig) -> None:
    run = train(rig2, steps=0)
    assert {path.name for path in (run.dir / "timeline").iterdir()} == {
        "rank-0.jsonl.gz", "rank-1.jsonl.gz",
    }  # fmt: skip
    assert (run.dir / "timeline.json.gz").exists()
    assert len(read_run(run.dir)[0].steps) == 16


def test_nothing_stays_patched(rig2: Rig) -> None:
    names = "[dist.all_reduce, dist.broadcast, dist.barrier]"
    rig2.session.execute(f"before = {names}")
    train(rig2)
    assert rig2.common(f"all(a is b for a, b in zip(before, {names}))")


@pytest.mark.alone
def test_a_planted_straggler_is_found(rig2: Rig) -> None:
    run = train(rig2, in_forward="pause(0.12 if rank == 1 else 0.0)")
    planted_ms = 1000 * rig2.values("took_s / num_steps")[1]
    found = analysis_of(run)
    late = found.stragglers[0]
    assert (late.rank, late.cause) == (1, "compute")
    assert late.waited_ms == pytest.approx(planted_ms, rel=0.1)
    assert late.excess_ms == pytest.approx(planted_ms, rel=0.1)
    assert "for rank 1, which computes" in advise(found)[0]


@pytest.mark.alone
def test_a_planted_data_stall_is_found(rig2: Rig) -> None:
    run = train(rig2, in_data="pause(0.006 if rank == 0 else 0.0)")
    planted_ms = 1000 * rig2.values("took_s / num_steps")[0]
    found = analysis_of(run)
    late = found.stragglers[0]
    assert (late.rank, late.cause) == (0, "data")
    assert late.waited_ms == pytest.approx(planted_ms, rel=0.1)
    assert "for rank 0, whose DataLoader" in advise(found)[0]


@pytest.mark.alone
def test_a_planted_slow_link_is_found(rig2: Rig) -> None:
    rig2.session.execute(SLOW_LINK)
    try:
        run = train(rig2)
        # Of the steps that are analysed: all but the first two.
        (planted_ms, _) = rig2.values("sum(link_ms[-14:]) / 14")
    finally:
        rig2.session.execute("dist.all_reduce = real_all_reduce")
    found = analysis_of(run)
    transfer_ms = found.share("transfer") * found.step_ms
    assert transfer_ms == pytest.approx(planted_ms, rel=0.1)
    assert "is spent exchanging" in advise(found)[0]


DDP = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)))
HOOK
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i, (xb, yb) in enumerate(loader):
    if i < 8 and i % world_size == rank:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
"""
AGAIN = DDP[DDP.index("optimizer = ") :]
"""The loop alone, with the model of an earlier cell."""
PARAMETERS = ("module.0.weight", "module.0.bias", "module.1.weight", "module.1.bias")


def reduced(run: Run) -> set[str]:
    """Return the names whose gradients a timeline shows being reduced."""
    trace = json.loads((run.dir / "timeline.json").read_text())
    rows = {e["pid"]: e["args"].get("name", "") for e in named(trace, "process_name")}
    done = {rows[e["pid"]] for e in named(trace, "ALLREDUCE")}
    return {name.removeprefix("allreduce.") for name in done}


@pytest.mark.parametrize("hook", ["", "model.register_comm_hook(None, allreduce_hook)"])
def test_the_collectives_of_ddp_are_seen(rig2: Rig, hook: str) -> None:
    rig2.session.execute(
        "from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook"
    )
    options = RunOptions(timeline="")
    run = rig2.session.train(DDP.replace("HOOK", hook), options=options)
    losses = run.history["loss"]
    assert hook or set(PARAMETERS) <= reduced(run)
    assert hook or analysis_of(run).share("exposed") > 0
    plain = rig2.session.train(DDP.replace("HOOK", ""))
    assert losses.tolist() == plain.history["loss"].tolist()


def test_ddp_is_seen_in_a_later_run_and_in_another_group(rig2: Rig) -> None:
    rig2.session.execute(DDP.replace("HOOK", ""))
    for _ in range(2):
        run = rig2.session.train(AGAIN, options=RunOptions(timeline=""))
        assert set(PARAMETERS) <= reduced(run)
        rig2.assert_same_weights("model")
        rig2.session.reset_group()


def test_a_clock_is_compared_to_within_the_error_that_is_stated(rig2: Rig) -> None:
    rig2.session.execute("from dtkit.engine.trace.clock import measure_offset")
    first, second = rig2.values("tuple(measure_offset(rank, (0, 1), is_forced=True))")
    assert first == (0, 0, True)
    offset_ns, error_ns, has_hosts = second
    assert has_hosts
    assert 0 < error_ns < 50_000_000
    assert abs(offset_ns) <= error_ns  # one host: the true offset is zero


def test_clocks_of_several_hosts_are_compared_again_at_the_end(rig2: Rig) -> None:
    cell = LOOP.replace("IN_DATA", "pass").replace("IN_FORWARD", "pass")
    rig2.session.execute("""\
from dtkit.engine.trace import clock
number, clock._host_number = clock._host_number, lambda: rank
""")
    try:
        run = rig2.session.train(cell, options=RunOptions(timeline=""))
        with pytest.raises(RankError, match="cut short"):
            rig2.session.train(f"{cell}\nassert rank, 'cut short'", options=RunOptions(timeline=""))
    finally:
        rig2.session.execute("clock._host_number = number")
    about = json.loads((run.dir / "timeline.json").read_text())["otherData"]
    assert "when it ended" in about["clock"]
    assert abs(about["clocks"]["1"]["drift_us"]) <= 2 * about["clocks"]["1"]["error_us"]
    rig2.session.execute("dist.barrier()")


def test_a_profile_of_all_ranks_is_one_trace(rig2: Rig) -> None:
    cell = LOOP.replace("IN_DATA", "pass").replace("IN_FORWARD", "pass")
    run = rig2.session.train(cell, options=RunOptions(profile=3))
    trace = json.loads(gzip.decompress((run.dir / "profile.json.gz").read_bytes()))
    names = {e["args"]["name"] for e in named(trace, "process_name")}
    assert {"rank 0 (cpu)", "rank 1 (cpu)"} <= names
    steps = [e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep#")]
    assert sorted(steps) == sorted(2 * ["ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"])
    arrows = [e for e in trace["traceEvents"] if e.get("cat") == "ranks"]
    assert [e["ph"] for e in arrows].count("s") == [e["ph"] for e in arrows].count("f") >= 3
    at = {e["id"]: e["ts"] for e in arrows if e["ph"] == "s"}
    assert all(e["ts"] >= at[e["id"]] for e in arrows)
    table = repr(run.operators())
    assert "rank 0, ms per step" in table
    assert "aten::" in table
    assert "USDT" not in run.output.text_of(0)
