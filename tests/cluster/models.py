"""Models that are trained whole and in parts, and the cell that trains them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rig import relative_error

from dtkit.errors import RankError

if TYPE_CHECKING:
    from rig import Rig

    from dtkit.driver.runs.run import Run

__all__ = [
    "CELL",
    "MODELS",
    "NUM_EPOCHS",
    "NUM_SAMPLES",
    "SETUP",
    "assert_goes_on",
    "assert_trains_as_one",
    "cell_for",
]

NUM_SAMPLES = 933
"""Of an epoch: twelve batches of 72, and one of 69."""
_STEPS_PER_EPOCH = 13
NUM_EPOCHS = 4 if "DTKIT_TEST_LONG" in os.environ else 2
"""With `--long` 52 steps, else 26."""

SETUP = """
import dtkit, math, time
import torch.nn.functional as F

def MLP():
    widths = [64, 48, 48, 48, 10]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*[module for layer in layers for module in layer][:-1])

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 16, 10)
    def forward(self, x):
        return self.head(self.features(x.view(-1, 1, 8, 8)))

class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd = num_heads, width
    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, width=32, num_heads=4, num_blocks=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(17, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, 17, bias=False)
    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.wte, self.encoder = nn.Embedding(17, 32), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 17)
    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.wte(tokens), mask=mask))

class Embedded(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.wte, self.wpe = model.wte, model.wpe
    def forward(self, tokens):
        return self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))

def layers_of(model):
    if isinstance(model, Conv):
        return [nn.Unflatten(1, (1, 8, 8)), *model.features, model.head]
    if isinstance(model, GPT):
        return [Embedded(model), *model.blocks, nn.Sequential(model.ln_f, model.head)]
    return list(model)

def loss_of(output, target):
    return cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))

def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()

few_set = TensorDataset(X[:933], y[:933])
pixels = (X[:933] * 16).long()[:, 20:37]
text_set = TensorDataset(pixels[:, :-1], pixels[:, 1:])
"""
"""An earlier cell, after the digits: a conv net, a small GPT, and what they train on."""

MODELS = {
    "mlp": ("MLP()", "few_set"),
    "conv": ("Conv()", "few_set"),
    "gpt": ("GPT()", "text_set"),
    "encoder": ("Encoder()", "text_set"),
}

CELL = """
torch.manual_seed(0)
model = MODEL
parts = model
LAYOUT
optimizer = torch.optim.SGD(parts.parameters(), lr=0.05, momentum=0.9)
loader = DataLoader(DATA, batch_size=72, shuffle=True)
losses = []
for epoch in range(EPOCHS):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = LOSS
        loss.backward()
        if not losses:
            grads = {name: whole(p.grad) for name, p in parts.named_parameters()}
        CLIP
        optimizer.step()
        losses.append(loss.item())
"""


def cell_for(kind: str, layout: str, loss: str = "loss_of(model(xb), yb)", clip: str = "") -> str:
    """Return the cell that trains one of `MODELS` for `NUM_EPOCHS`."""
    model, data = MODELS[kind]
    replacements = {
        "MODEL": model, "LAYOUT": layout, "DATA": data, "LOSS": loss, "CLIP": clip,
        "EPOCHS": str(NUM_EPOCHS),
    }  # fmt: skip
    cell = CELL
    for word, text in replacements.items():
        cell = cell.replace(word, text or "pass")
    return cell


_RUN: dict[str, dict[str, Any]] = {}
"""What cells have left in this process: many tests compare with the same one."""


def _plain(rig: Rig, cell: str) -> dict[str, Any]:
    if cell not in _RUN:
        names = rig.plain(cell)
        _RUN[cell] = {name: names[name] for name in ("losses", "grads")}
    return _RUN[cell]


def assert_trains_as_one(
    rig: Rig, kind: str, layout: str, *, loss: str = "loss_of(model(xb), yb)", clip: str = "",
    plain: str = "", **options: Any,
) -> Run:  # fmt: skip
    """Assert that losses over `NUM_EPOCHS` and the first gradients are those of one process.

    `plain` stands in that process in the place of `layout`.
    """
    expected = _plain(rig, SETUP + cell_for(kind, plain, clip=clip))
    run = rig.train(cell_for(kind, layout, loss, clip), **options)
    assert len(expected["losses"]) == NUM_EPOCHS * _STEPS_PER_EPOCH
    assert relative_error(run.history["loss"], expected["losses"]) < 1e-5
    grads: dict[str, torch.Tensor] = {}
    for rank in rig.session.ranks:  # of a pipeline each has its own
        if set(grads) != set(expected["grads"]):
            grads |= rig.session.pull("grads", rank=rank).value
    assert set(grads) == set(expected["grads"])
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6, msg=name)
    return run


_FAILING = """
store = dist.distributed_c10d._get_default_store()
        if len(losses) == 3 and rank == 2:
            while store.add("others have made it", 0) < 3:
                time.sleep(0.01)
            1 / 0
        optimizer.step()
        store.add("others have made it", len(losses) == 3)
"""
"""In the place of a step: rank 2 fails before its fourth, when the others have made theirs."""


def assert_goes_on(
    rig: Rig,
    kind: str,
    layout: str,
    loss: str = "loss_of(model(xb), yb)",
    *,
    has_copies: bool = False,
) -> None:
    """Assert that a model trains on in the next group when a rank has failed in the middle.

    What it has then is what it had, and the same steps follow as in one process from there.
    """
    cell = cell_for(kind, layout, loss)
    failing = cell.replace("optimizer.step()", _FAILING.strip())
    with pytest.raises(RankError, match="ZeroDivisionError"):
        rig.train(failing)
    rig.session.execute("optimizer.zero_grad()")
    start = rig.session.pull("parts").value
    goes_on = cell.partition("losses = []")[2].replace("range(2)", "range(1)")
    goes_on = "torch.manual_seed(3)\nlosses = []" + goes_on
    goes_on = goes_on.replace("loader:", "DataLoader(DATA, batch_size=150, shuffle=True):")
    goes_on = goes_on.replace("DATA", MODELS[kind][1])
    fresh = "optimizer = torch.optim.SGD(parts.parameters(), lr=0.05)\n"
    run = rig.train(fresh + goes_on)
    # Of a part that nobody else has the failed rank lacks a step.
    is_behind = any("lack the step in which a rank failed" in note for note in run.notes)
    assert is_behind is not has_copies
    names = rig.plain(SETUP)
    names |= {"model": start, "parts": start}
    exec(fresh + goes_on.replace(loss, "loss_of(model(xb), yb)"), names)  # noqa: S102  our own text
    assert relative_error(run.history["loss"], names["losses"]) < 1e-5
