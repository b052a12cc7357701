"""A model whose layers are divided over ranks trains as one device does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import SETUP, assert_goes_on, assert_trains_as_one, cell_for

import dtkit
from dtkit.errors import RankError
from dtkit.options import RunOptions

if TYPE_CHECKING:
    from rig import Rig

CLIP = "nn.utils.clip_grad_norm_(parts.parameters(), 0.5)"


def divided(options: str = "") -> str:
    return f"dtkit.tensor_parallel(model{options})"


@pytest.fixture(scope="module")
def rig(rig4: Rig) -> Rig:
    rig4.session.execute(SETUP)
    return rig4


@pytest.mark.parametrize(
    ("kind", "options", "chosen"),
    [
        ("mlp", "", "4 layers divided, 0.0"),
        ("conv", ", {'head': 'rowwise'}", "1 layers divided"),
        ("gpt", ", num_ranks=2", "16 layers divided"),
        ("encoder", "", "6 layers divided"),
    ],
)
def test_a_divided_model_trains_as_one_device_does(
    rig: Rig, kind: str, options: str, chosen: str
) -> None:
    run = assert_trains_as_one(rig, kind, divided(options), clip=CLIP)
    notes = " ".join(run.notes)
    num_data = 2 if "num_ranks" in options else 1
    assert f"tensor parallel over {4 // num_data} ranks: {chosen}" in notes
    assert f"(global batch 72 = {num_data} × {72 // num_data})" in notes
    assert "left alone" not in notes
    num_samples = run.history["samples_per_s"] * run.history["step_ms"] / 1000
    assert sum(num_samples) == pytest.approx(2 * 1797)


def test_other_flags_go_with_it_and_it_is_whole_again(rig: Rig) -> None:
    resume = "start = dtkit.resume(model=model, optimizer=optimizer)"
    cell = cell_for("gpt", divided(", num_ranks=2"))
    cell = cell.replace("losses = []", f"losses = []\n{resume}", 1)
    cell = cell.replace("range(2)", "range(start.epoch, 2)")
    flags: dict[str, Any] = {"accumulate": 2, "compress": "fp16", "amp": "bf16"}
    whole = rig.train(cell, options=RunOptions(max_steps=10), **flags)
    first = rig.train(cell, options=RunOptions(checkpoint_every=4, max_steps=4), **flags)
    rest = RunOptions(resume=first.name, max_steps=6, checkpoint_every=6)
    second = rig.train(cell, options=rest, **flags)
    assert list(second.history["loss"]) == pytest.approx(list(whole.history["loss"][4:]), rel=1e-4)
    names = rig.plain(SETUP + "model = GPT()")
    (path,) = (second.dir / "checkpoints").glob("step-00000010")
    dtkit.resume(path, model=names["model"])
    rig.session.execute("out = model(pixels[:5, :-1]).detach()")
    pulled = rig.session.pull("model", rank=3).value
    assert type(pulled).__name__ == "GPT"
    assert all(type(p) is torch.nn.Parameter for p in pulled.parameters())
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(pulled.state_dict()[name], tensor), name
    output = pulled(names["pixels"][:5, :-1])
    torch.testing.assert_close(rig.session.pull("out").value, output.detach())
    output.sum().backward()  # no hook of the ranks' is left


def test_attention_of_torch_is_whole_again_with_all_its_arguments(rig: Rig) -> None:
    rig.session.execute("""
import copy
torch.manual_seed(0)
whole_one = nn.MultiheadAttention(32, 4, kdim=16, vdim=24)
box = nn.Sequential(copy.deepcopy(whole_one))
dtkit.tensor_parallel(box)
q, k, v = torch.randn(6, 3, 32), torch.randn(7, 3, 16), torch.randn(7, 3, 24)
masks = dict(attn_mask=torch.rand(12, 6, 7), key_padding_mask=torch.arange(7).expand(3, 7) > 4)
apart = []
for args in ({}, masks, dict(masks, need_weights=False), dict(average_attn_weights=False)):
    for a, b in zip(whole_one(q, k, v, **args), box[0](q, k, v, **args)):
        apart.append(0.0 if a is None else float((a - b).abs().max()))
box.eval()
""")
    assert max(rig.common("apart")) < 1e-6
    pulled = rig.session.pull("box").value[0]
    assert type(pulled) is torch.nn.MultiheadAttention
    expected = rig.session.pull("whole_one").value
    for name, tensor in pulled.state_dict().items():
        assert torch.equal(expected.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "options", "answer"),
    [
        ("conv", "", r"nothing in Conv can be divided(?s:.*)head \(Linear\) +whole +neither"),
        ("gpt", ", num_ranks=3", r"num_ranks=3\): 2 or more, and a divisor of 4"),
        ("gpt", ", {'hed': 'colwise'}", "no layer is called 'hed'; there are: wte, wpe"),
        ("gpt", ", {'head': 'colwise'}", "head cannot be colwise: 17 is not a multiple of 4"),
        ("gpt", ", {'ln_f': 'colwise'}", "it is LayerNorm, not nn.Linear or nn.Embedding"),
        ("gpt", ", {'wte': 'columns'}", "styles are colwise, rowwise, fused:N, heads, whole"),
    ],
)
def test_what_cannot_be_is_refused(rig: Rig, kind: str, options: str, answer: str) -> None:
    model = {"conv": "Conv()", "gpt": "GPT()"}[kind]
    with pytest.raises(RankError, match=answer):
        rig.session.execute(f"model = {model}\n{divided(options)}")


@pytest.mark.parametrize("options", ["", ", num_ranks=2"])
def test_it_goes_on_after_a_rank_has_failed(rig: Rig, options: str) -> None:
    assert_goes_on(rig, "gpt", divided(options))
