"""A model cut into stages trains as one device does, under every schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import NUM_EPOCHS, NUM_SAMPLES, SETUP, assert_goes_on, assert_trains_as_one, cell_for

import dtkit
from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

CLIP = "nn.utils.clip_grad_norm_(parts.parameters(), 0.5)"
PLAIN = "parts = nn.Sequential(*layers_of(model))"
LOSS = "parts(xb, yb)"


def pipe(options: str = "") -> str:
    return f"parts = dtkit.pipeline(layers_of(model), loss_of{options})"


@pytest.fixture(scope="module")
def rig(rig4: Rig) -> Rig:
    rig4.session.execute(SETUP)
    return rig4


@pytest.mark.parametrize(
    ("kind", "schedule", "ranks"),
    [
        ("mlp", "gpipe", 4),
        ("conv", "1f1b", 4),
        ("gpt", "1f1b", 2),
        ("mlp", "interleaved", 2),
        ("conv", "zero-bubble", 2),
        ("gpt", "zero-bubble", 2),
    ],
)
def test_a_pipeline_trains_as_one_device_does(
    rig: Rig, kind: str, schedule: str, ranks: int
) -> None:
    layout = pipe(f", schedule={schedule!r}, num_ranks={ranks}")
    run = assert_trains_as_one(rig, kind, layout, loss=LOSS, plain=PLAIN, clip=CLIP)
    notes = " ".join(run.notes)
    assert f"{schedule}, " in notes
    assert "rank 1: layer" in notes
    num_data = 4 // ranks
    assert f"(global batch 72 = {num_data} × {72 // num_data})" in notes
    num_samples = run.history["samples_per_s"] * run.history["step_ms"] / 1000
    assert sum(num_samples) == pytest.approx(NUM_EPOCHS * NUM_SAMPLES)


def test_stages_are_cut_by_measured_time(rig: Rig) -> None:
    rig.session.execute("""
class Slow(nn.Linear):
    def forward(self, x):
        for _ in range(400):
            x = x + 0 * super().forward(x)
        return x
torch.manual_seed(0)
pipe = dtkit.pipeline([Slow(8, 8), *[nn.Linear(8, 8) for _ in range(5)]], loss_of, num_ranks=2,
                      example=torch.ones(8, 8))
held = [name for name, _ in pipe.named_parameters()]
""")  # fmt: skip
    assert [held[0] for held in rig.values("held")] == ["0.weight", "1.weight"] * 2


def test_a_pulled_model_is_whole_and_outputs_are_everywhere(rig: Rig) -> None:
    rig.train(cell_for("mlp", pipe(), LOSS), options=RunOptions(max_steps=3))
    rig.session.execute(
        "with torch.no_grad(): out, loss = parts.outputs(X[:6]), parts(X[:8], y[:8])"
    )
    model = rig.session.pull("parts", rank=1).value
    assert type(model) is torch.nn.Sequential
    digits = rig.plain("")
    expected = model(digits["X"][:6])
    for rank in rig.session.ranks:
        torch.testing.assert_close(rig.session.pull("out", rank=rank).value, expected)
        loss = rig.session.pull("loss", rank=rank).value
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(model(digits["X"][:8]), digits["y"][:8])
        )


def test_a_checkpoint_is_resumed_and_loads_into_the_whole_model(rig: Rig) -> None:
    resume = "start = dtkit.resume(model=parts, optimizer=optimizer)"
    cell = cell_for("gpt", pipe(), LOSS).replace("losses = []", f"losses = []\n{resume}")
    cell = cell.replace("range(", "range(start.epoch, ", 1)
    whole = rig.train(cell, options=RunOptions(max_steps=6))
    first = rig.train(cell, options=RunOptions(checkpoint_every=2, max_steps=2))
    second = rig.train(cell, options=RunOptions(resume=first.name, max_steps=4))
    assert list(second.history["loss"]) == pytest.approx(list(whole.history["loss"][2:]), rel=1e-5)
    names: Any = rig.plain(SETUP + "model = nn.Sequential(*layers_of(GPT()))")
    (path,) = (first.dir / "checkpoints").glob("step-00000002")
    assert dtkit.resume(path, model=names["model"]).step == 2
    rig.session.execute(f"""
parts = dtkit.pipeline(layers_of(GPT()), loss_of)
dtkit.resume({str(path)!r}, model=parts)""")
    pulled = rig.session.pull("parts").value.state_dict()
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(pulled[name], tensor), name


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (", num_ranks=3", r"num_ranks=3\): 2 or more, and a divisor of 4"),
        (", schedule='dual'", "choose one of gpipe, 1f1b, interleaved, zero-bubble"),
        (", num_microbatches=2", "1f1b wants 4, one a stage"),
        (", num_stages=8, schedule='interleaved'", "4 layers with parameters, 8 stages, 4 ranks"),
    ],
)
def test_what_cannot_be_is_refused(rig: Rig, options: str, answer: str) -> None:
    with pytest.raises(RankError, match=answer):
        rig.train(cell_for("mlp", pipe(options), LOSS))


def test_a_model_that_has_no_layers_in_a_row_is_refused(rig: Rig) -> None:
    with pytest.raises(RankError, match=r"GPT is neither an nn\.Sequential nor a list of layers"):
        rig.session.execute("dtkit.pipeline(GPT(), F.cross_entropy)")


def test_autocast_is_for_the_layers(rig: Rig) -> None:
    with pytest.raises(RankError, match="--amp bf16: the forward passes of a pipeline"):
        rig.train(cell_for("mlp", pipe(), LOSS), amp="bf16")


def test_it_goes_on_after_a_rank_has_failed(rig: Rig) -> None:
    assert_goes_on(rig, "mlp", pipe(), LOSS)
