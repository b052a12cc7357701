"""A sharded model trains as one device does, and is whole again where it is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from models import NUM_EPOCHS, NUM_SAMPLES, SETUP, assert_goes_on, assert_trains_as_one, cell_for

import dtkit
import dtkit.driver.transfer.verbs
from dtkit.errors import InvalidInputError, RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

LAYOUT = "model = dtkit.shard(model, min_unit_params=1000)"
CLIP = "nn.utils.clip_grad_norm_(model.parameters(), 0.5)"


@pytest.fixture(scope="module")
def rig(rig4: Rig) -> Rig:
    rig4.session.execute(SETUP)
    return rig4


@pytest.fixture(scope="module")
def plain(rig: Rig) -> Any:
    """The names of the notebook, where the model's class is the plain one."""
    return rig.plain(SETUP)


@pytest.mark.parametrize("kind", ["mlp", "conv", "gpt"])
def test_a_sharded_model_trains_as_one_device_does(rig: Rig, kind: str) -> None:
    run = assert_trains_as_one(rig, kind, LAYOUT, clip=CLIP)
    notes = " ".join(run.notes)
    assert "sharded over 4 ranks" in notes
    assert "1 DataLoader sharded (global batch 72 = 4 × 18), gradients averaged by torch" in notes
    assert "left alone" not in notes
    num_samples = run.history["samples_per_s"] * run.history["step_ms"] / 1000
    assert sum(num_samples) == pytest.approx(NUM_EPOCHS * NUM_SAMPLES)


@pytest.mark.parametrize("strategy", ["shard", "hybrid:2"])
def test_an_unedited_cell_is_sharded(rig: Rig, strategy: str) -> None:
    run = assert_trains_as_one(rig, "mlp", "", clip=CLIP, strategy=strategy)
    assert any(note.startswith("Sequential sharded over") for note in run.notes)
    assert rig.common("[type(p).__name__ for p in model.parameters()]") == ["DTensor"] * 8


def test_a_pulled_model_is_whole_and_of_its_own_class(rig: Rig, plain: Any) -> None:
    rig.train(cell_for("gpt", LAYOUT), options=RunOptions(max_steps=3))
    rig.session.execute("there = {k: whole(v) for k, v in model.state_dict().items()}")
    there = rig.session.pull("there").value
    pulled = rig.session.pull("model", rank=2)
    model = pulled.value
    assert type(model).__name__ == "GPT"
    assert type(model.blocks[0]).__name__ == "Block"
    assert pulled.num_bytes > sum(p.nbytes for p in model.parameters())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert list(model.state_dict()) == list(there)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, there[name]), name
    fresh = plain["GPT"]()
    fresh.load_state_dict(model.state_dict())
    tokens = plain["pixels"][:5, :-1]
    assert torch.equal(fresh(tokens), model(tokens))
    model(tokens).sum().backward()  # no hook of the ranks' is left


def test_a_part_comes_over_in_pieces_from_another_host(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.session.execute("torch.manual_seed(1); net = nn.Linear(300, 7001)\ndtkit.shard(net)")
    here = rig.session.pull("net").value
    monkeypatch.setattr("dtkit.driver.transfer.gathering.platform.node", lambda: "elsewhere")
    monkeypatch.setattr("dtkit.chunks._BLOCK", 1 << 20)
    rig.session.execute("import dtkit.chunks; dtkit.chunks._BLOCK = 1 << 20")
    there = rig.session.pull("net").value
    torch.manual_seed(1)
    expected = torch.nn.Linear(300, 7001)
    assert torch.equal(here.weight, expected.weight)
    assert torch.equal(there.weight, expected.weight)
    assert torch.equal(there.bias, expected.bias)


def test_what_does_not_fit_the_notebook_is_refused_before_it_is_sent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.session.execute("net = nn.Linear(512, 512); dtkit.shard(net)")
    memory = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(dtkit.driver.transfer.verbs.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(InvalidInputError, match=r"net has 1\.0 MiB, and 976\.6 KiB are free"):
        rig.session.pull("net")


def test_a_checkpoint_is_resumed_by_the_ranks_and_loads_into_the_plain_class(
    rig: Rig, plain: Any
) -> None:
    resume = "start = dtkit.resume(model=model, optimizer=optimizer)"
    cell = cell_for("gpt", LAYOUT).replace("losses = []", f"losses = []\n{resume}")
    cell = cell.replace("range(", "range(start.epoch, ", 1)
    whole = rig.train(cell, options=RunOptions(max_steps=6))
    first = rig.train(cell, options=RunOptions(checkpoint_every=2, max_steps=2))
    second = rig.train(cell, options=RunOptions(resume=first.name, max_steps=4))
    assert list(second.history["loss"]) == pytest.approx(list(whole.history["loss"][2:]), rel=1e-6)
    model = plain["GPT"]()
    (path,) = (first.dir / "checkpoints").glob("step-00000002")
    assert dtkit.resume(path, model=model).step == 2
    rig.session.execute(f"""
torch.manual_seed(5); model = GPT(); dtkit.shard(model)
dtkit.resume({str(path)!r}, model=model)""")
    pulled = rig.session.pull("model").value
    for name, tensor in pulled.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


SMALL = """
import resource
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
limits = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (used + (150 << 20), limits[1]))
try:
    with torch.device(DEVICE):
        model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(20)])  # 80 MiB
    LAYOUT
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 1024)).square().mean().backward()
        optimizer.step()
finally:
    resource.setrlimit(resource.RLIMIT_DATA, limits)
"""


def test_a_model_that_does_not_fit_one_rank_trains_sharded(rig: Rig) -> None:
    with pytest.raises(RankError, match="memory"):
        rig.train(SMALL.replace("DEVICE", "'cpu'").replace("LAYOUT", "pass"))
    run = rig.train(SMALL.replace("DEVICE", "'meta'").replace("LAYOUT", "dtkit.shard(model)"))
    assert "20 of 80.1 MiB of parameters on each, gathered in 21 units" in " ".join(run.notes)
    assert len(run.history["loss"]) == 3
    rig.session.execute("del model, optimizer")


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"compress": "topk:0.1"}, "torch averages the gradients of a model that is sharded"),
        ({"amp": "fp16"}, "a rank that finds an infinite gradient in its part"),
    ],
)
def test_a_flag_that_does_not_go_with_it_is_refused(
    rig: Rig, flags: dict[str, str], answer: str
) -> None:
    with pytest.raises(RankError, match=answer):
        rig.train(cell_for("mlp", LAYOUT), **flags)


def test_steps_are_accumulated_and_passes_too(rig: Rig) -> None:
    def losses(cell: str, **recipe: Any) -> list[float]:
        return list(rig.train(cell, options=RunOptions(max_steps=12), **recipe).history["loss"])

    cell = cell_for("mlp", LAYOUT)
    plain = losses(cell_for("mlp", ""), accumulate=2)
    assert losses(cell, accumulate=2) == pytest.approx(plain, rel=1e-5)
    halves = """model.set_requires_gradient_sync(False)
        (0.5 * loss).backward()
        model.set_requires_gradient_sync(True)
        (0.5 * loss_of(model(xb), yb)).backward()"""
    found = losses(cell.replace("loss.backward()", halves))
    assert found == pytest.approx(losses(cell), rel=1e-5)


def test_units_compute_in_another_precision_than_they_are_kept_in(rig: Rig) -> None:
    exact = rig.train(cell_for("mlp", LAYOUT), options=RunOptions(max_steps=12))
    seen = """seen = []
model[0].register_forward_pre_hook(lambda m, i: seen.append((i[0].dtype, m.weight.dtype)))
"""
    policy = "param_dtype=torch.bfloat16, reduce_dtype=torch.float32, "
    layout = LAYOUT.replace("min_unit", policy + "min_unit") + "\n" + seen
    run = rig.train(cell_for("mlp", layout), options=RunOptions(max_steps=12))
    assert rig.common("[str(d) for d in seen[0]]") == ["torch.bfloat16"] * 2
    assert rig.common("str(loss.dtype)") == "torch.float32"
    assert rig.common("[str(p.dtype) for p in model.parameters()]") == ["torch.float32"] * 8
    assert list(run.history["loss"]) == pytest.approx(list(exact.history["loss"]), rel=0.02)
    assert list(run.history["loss"]) != pytest.approx(list(exact.history["loss"]), rel=1e-6)


@pytest.mark.parametrize("options", ["", ", num_shards=2"])
def test_it_goes_on_after_a_rank_has_failed(rig: Rig, options: str) -> None:
    assert_goes_on(rig, "mlp", LAYOUT.replace(")", f"{options})"), has_copies=bool(options))


def test_when_a_rank_is_lost_the_model_says_so(rig: Rig, owned_pids: set[int]) -> None:
    cell = cell_for("mlp", LAYOUT)
    with pytest.raises(RankError):
        rig.train(
            "import os\n"
            + cell.replace("optimizer.step()", "rank == 3 and os.kill(os.getpid(), 9)")
        )
    rig.session.restart()
    owned_pids.update(rig.session.pids())
    with pytest.raises(RankError, match="not all of its ranks are in the new one"):
        rig.session.execute("model(X[:4])", ranks=[0])
