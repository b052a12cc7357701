"""A model whose layers are divided over ranks trains as one device does."""

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


OTHERS = """
class Llama(nn.Module):  # fewer heads of k and v, rotated as complex numbers, a mask that is added
    def __init__(self):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = 4, 2, 8
        self.wq, self.wo = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.wk, self.wv = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
        angles = torch.arange(64.0).view(16, 4)
        self.register_buffer("turn", torch.polar(torch.ones(16, 4), angles), persistent=False)
        self.w1, self.w3 = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.w2, self.scale = nn.Linear(64, 32, bias=False), nn.Parameter(torch.ones(64))
    def rotated(self, x):
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.turn[None, :, None]).flatten(3).type_as(x)
    def forward(self, x):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim)
        k = self.rotated(k)[:, :, :, None, :].expand(B, T, 2, 2, 8).reshape(B, T, 4, 8)
        q, v = self.rotated(q), torch.repeat_interleave(v, 2, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) / 8**0.5 + torch.full((T, T), -torch.inf).triu(1)
        y = F.softmax(scores.float(), dim=-1) @ v
        x = x + self.wo(y.transpose(1, 2).contiguous().view(B, T, -1))
        return x + self.w2(F.silu(self.w1(x)) * self.w3(x) * self.scale)

class Vit(nn.Module):  # q, k and v in one, by reshape; a gate in one layer with what it gates
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.gate_up_proj, self.down_proj = nn.Linear(32, 128), nn.Linear(64, 32)
    def forward(self, x):
        B, N, C = x.shape
        parts = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.bias[:, :, :N, :N] == 0, -torch.inf)
        x = x + self.proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, N, C))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    def forward(self, x):
        return self.model(x, x)

def apart(kind):
    torch.manual_seed(0)
    alone, x = kind(), torch.randn(3, 16, 32)
    together = dtkit.tensor_parallel(copy.deepcopy(alone), num_ranks=2)
    found = []
    for model in (alone, together):
        out = model(x)
        assert type(out) is torch.Tensor
        out.square().mean().backward()
        found.append([out.detach(), *(whole(p.grad) for p in model.parameters())])
        with torch.no_grad():
            found[-1].append(model.eval()(x))
    return max(float((a - b).abs().max()) for a, b in zip(*found))
"""


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
        ("gpt", ", num_ranks=2", "8 layers divided"),
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
    assert sum(num_samples) == pytest.approx(NUM_EPOCHS * NUM_SAMPLES)


def test_other_flags_go_with_it_and_it_is_whole_again(rig: Rig) -> None:
    resume = "start = dtkit.resume(model=model, optimizer=optimizer)"
    cell = cell_for("gpt", divided(", num_ranks=2"))
    cell = cell.replace("losses = []", f"losses = []\n{resume}", 1)
    cell = cell.replace("range(", "range(start.epoch, ", 1)
    flags: dict[str, Any] = {"accumulate": 2, "compress": "fp16", "amp": "bf16"}
    whole = rig.train(cell, options=RunOptions(max_steps=6), **flags)
    first = rig.train(cell, options=RunOptions(checkpoint_every=2, max_steps=2), **flags)
    rest = RunOptions(resume=first.name, max_steps=4, checkpoint_every=4)
    second = rig.train(cell, options=rest, **flags)
    assert list(second.history["loss"]) == pytest.approx(list(whole.history["loss"][2:]), rel=1e-4)
    names = rig.plain(SETUP + "model = GPT()")
    (path,) = (second.dir / "checkpoints").glob("step-00000006")
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


def test_what_people_write_computes_the_same(rig: Rig) -> None:
    rig.session.execute("import copy" + OTHERS)
    shown = rig.session.execute("found = [apart(kind) for kind in (Llama, Vit, Both)]")
    assert max(rig.common("found")) < 1e-6
    rows = [line.split() for line in shown.text_of(0).splitlines()]
    chosen = {row[0]: row[2] for row in rows if row[1:2] == ["(Linear)"]}
    expected = {"wq": "colwise", "wk": "colwise", "wo": "rowwise", "w1": "colwise", "w2": "rowwise"}
    expected |= {"qkv": "fused:3", "proj": "rowwise", "gate_up_proj": "fused:2"}
    assert expected.items() <= chosen.items()


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


def test_an_optimizer_whose_model_is_gone_does_not_end_the_next_run(rig: Rig) -> None:
    """As after a cell that made a new model, and failed before it made the optimizer."""
    rig.session.execute(
        f"model = MLP()\n{divided()}\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "del model"
    )
    rig.train("import gc; gc.collect()")
    rig.train("done = 1")


@pytest.mark.parametrize("options", ["", ", num_ranks=2"])
def test_it_goes_on_after_a_rank_has_failed(rig: Rig, options: str) -> None:
    assert_goes_on(rig, "gpt", divided(options), has_copies=bool(options))
