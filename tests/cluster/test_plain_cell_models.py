"""Unedited cells that use more of torch: each gives one device's loss curve on two ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rig import relative_error

if TYPE_CHECKING:
    from rig import Rig

TOLERANCE = 1e-5

START = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
losses = []
"""
SPARSE = (
    START
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pixels = nn.Embedding(1000, 10, sparse=True)
        self.unused = nn.Embedding(10, 10, sparse=True)
        self.out = nn.Linear(10, 10)
    def forward(self, x):
        codes = (x * 16).long() + 17 * torch.arange(x.shape[1]) % 900
        return self.out(self.pixels(codes).mean(1))
model = Net()
sparse = torch.optim.SparseAdam([model.pixels.weight, model.unused.weight], lr=1e-2)
dense = torch.optim.Adam(model.out.parameters(), lr=1e-2)
for epoch in range(4):
    for xb, yb in loader:
        loss = cross_entropy(model(xb), yb)
        sparse.zero_grad(); dense.zero_grad()
        loss.backward()
        sparse.step(); dense.step()
        losses.append(loss.item())
assert model.unused.weight.grad is None
"""
)
NO_GRADIENT = (
    START
    + """
model = nn.ModuleDict({"used": nn.Linear(64, 10), "unused": nn.Linear(3, 4)})
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model["used"](xb), yb)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
assert model["unused"].weight.grad is None
"""
)
PENALTY = (
    START
    + """
critic = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
model = critic
optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
one = torch.tensor(1.0)
for epoch in range(4):
    for real, _ in loader:
        fake = 1 - real
        optimizer.zero_grad()
        real_score = critic(real).mean()
        real_score.backward(-one)
        fake_score = critic(fake).mean()
        fake_score.backward(one)
        mixed = (0.3 * real + 0.7 * fake).requires_grad_()
        grad, = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = 10 * ((grad.norm(2, dim=1) - 1) ** 2).mean()
        penalty.backward()
        optimizer.step()
        losses.append(fake_score.item() - real_score.item() + penalty.item())
"""
)
TWICE_THROUGH = (
    START
    + """
from torch.utils.checkpoint import checkpoint
first, second = nn.Linear(64, 64), nn.Linear(64, 10)
model = nn.Sequential(first, second)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(4):
    for xb, yb in loader:
        xb.requires_grad_()
        hidden = torch.relu(first(xb))
        hidden = checkpoint(lambda h: torch.relu(first(h)), hidden, use_reentrant=True)
        loss = cross_entropy(second(hidden), yb)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
        optimizer.step()
        losses.append(1.5 * loss.item())
"""
)
MOVED = (
    START
    + """
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(4):
    if epoch == 1:
        model.to(torch.float64)
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].double()
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb.to(model[0].weight.dtype)), yb)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
"""
)
SCALED = (
    START
    + """
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
for epoch in range(4):
    for step, (xb, yb) in enumerate(loader):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            loss = cross_entropy(model(xb), yb)
        is_bad = step in (3, 9)
        if is_bad:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if not is_bad:
            losses.append(loss.item())
"""
)
COMPILED = (
    START
    + """
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
model = torch.compile(model, backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
@torch.compile(backend="eager")
def step():
    optimizer.step()
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
"""
)
IN_BACKWARD = (
    START
    + """
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizers = {p: torch.optim.Adam([p], lr=1e-2) for p in model.parameters()}
def hook(p):
    optimizers[p].step()
    optimizers[p].zero_grad()
for p in model.parameters():
    p.register_post_accumulate_grad_hook(hook)
for epoch in range(4):
    for xb, yb in loader:
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        losses.append(loss.item())
"""
)
TRAINER = """
def train(net, optimizer, scheduler, losses, num_epochs):
    for epoch in range(num_epochs):
        total = 0.0
        for batch in loader:
            losses.append(train_step(net, optimizer, batch))
            total += losses[-1] * len(batch[0]) / 1797
        scheduler.step(total)

def train_step(net, optimizer, batch):
    xb, yb = batch
    loss = cross_entropy(net(xb), yb)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

def main():
    torch.manual_seed(0)
    net = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3)
    losses = []
    train(net, optimizer, scheduler, losses, 6)
    return net, optimizer.param_groups[0]["lr"], losses

loader = DataLoader(train_set, batch_size=64, shuffle=True)
model, lr, losses = main()
"""
OWN_COPY = (
    START
    + """
import copy
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.ones(64))
    def __setstate__(self, state):
        self.__dict__.update(state)
    def forward(self, x):
        return self.out(self.scale * self.norm(x))
model = copy.deepcopy(Own())
del Own
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for epoch in range(2):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
"""
)
"""Its copies are made without torch's own methods, by which modules are noted."""

CELLS = {
    "sparse": SPARSE,
    "no-gradient": NO_GRADIENT,
    "penalty": PENALTY,
    "twice-through": TWICE_THROUGH,
    "moved": MOVED,
    "scaled": SCALED,
    "compiled": COMPILED,
    "in-backward": IN_BACKWARD,
    "trainer": TRAINER,
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_the_loss_curve_is_that_of_one_device(rig2: Rig, cell: str) -> None:
    expected = rig2.plain(cell)
    run = rig2.train(cell)
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE
    rig2.assert_same_weights("model")


def test_a_model_that_is_copied_its_own_way_is_found(rig2: Rig) -> None:
    run = rig2.train(OWN_COPY)
    assert "1 model broadcast" in " ".join(run.notes)
    rig2.assert_same_weights("model")
    rig2.common("[round(float(x), 6) for x in model.norm.running_mean[:8]]")
