"""The loss curve of an unedited cell on N ranks is the one of the same cell in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rig import relative_error

if TYPE_CHECKING:
    from rig import Rig

TOLERANCE = 1e-5

LOADER = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
losses = []
"""
MLP = """
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""

SGD = (
    LOADER
    + MLP
    + """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
for epoch in range(4):
    for xb, yb in loader:
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
"""
)
ADAM_CLIPPED = (
    LOADER
    + MLP
    + """
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
"""
)
TWO_PASSES = (
    LOADER
    + MLP
    + """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        penalty = 1e-3 * sum(p.abs().sum() for p in model.parameters())
        penalty.backward()
        optimizer.step()
        losses.append(loss.item() + penalty.item())
"""
)
ACCUMULATED = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=60, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=2e-2, total_steps=4 * (len(loader) // 4 + 1)
)
losses, total = [], 0.0
for epoch in range(4):
    for i, (xb, yb) in enumerate(loader, start=1):
        loss = cross_entropy(model(xb), yb) / 4
        loss.backward()
        total += loss.item()
        if i % 4 == 0 or i == len(loader):
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total)
            total = 0.0
"""
CLOSURE = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=len(train_set), shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
losses = []
for epoch in range(6):
    for xb, yb in loader:
        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(xb), yb)
            loss.backward()
            return loss
        losses.append(optimizer.step(closure).item())
"""
GAN = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
noise = torch.randn(1800, 8)
netG = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
netD = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
criterion = nn.BCEWithLogitsLoss()
losses, errG = [], 0.0
for epoch in range(4):
    for real, _ in loader:
        netD.zero_grad()
        errD_real = criterion(netD(real), torch.ones(len(real), 1))
        errD_real.backward()
        fake = netG(real[:, :8])
        errD_fake = criterion(netD(fake.detach()), torch.zeros(len(real), 1))
        errD_fake.backward()
        optimizerD.step()
        losses.append(float(errG) + errD_real.item() + errD_fake.item())
        netG.zero_grad()
        errG = criterion(netD(fake), torch.ones(len(real), 1))
        errG.backward()
        errG = errG.item()
        optimizerG.step()
model = nn.ModuleList([netD, netG])
"""
SHARED = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(64, 32)
        self.out = nn.Linear(32, 64)
        self.out.weight = nn.Parameter(self.into.weight.detach().t().clone())
        self.norm = nn.Parameter(torch.ones(64))
    def forward(self, x):
        return self.out(torch.relu(self.into(x)))
coder = Tied()
coder.out = nn.Linear(32, 64)
classifier = nn.Sequential(coder.into, nn.ReLU(), nn.Linear(32, 10))
opt1 = torch.optim.SGD(coder.parameters(), lr=0.1)
opt2 = torch.optim.Adam(classifier.parameters(), lr=1e-2)
losses, rest = [], 0.0
for epoch in range(4):
    for xb, yb in loader:
        opt1.zero_grad()
        loss = (coder(xb) - xb).square().mean()
        loss.backward()
        opt1.step()
        losses.append(rest + loss.item())
        opt2.zero_grad()
        loss = cross_entropy(classifier(xb), yb)
        loss.backward()
        opt2.step()
        rest = loss.item()
model = nn.ModuleList([coder, classifier])
"""
THAWED = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=64, shuffle=True)
body, head = nn.Linear(64, 32), nn.Linear(32, 10)
extra = nn.Linear(64, 10)
model = nn.Sequential(body, nn.ReLU(), head)
for p in body.parameters():
    p.requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
losses = []
for epoch in range(5):
    for step, (xb, yb) in enumerate(loader):
        if epoch == 1 and step == 7:
            body.weight.requires_grad_(True)
        if epoch == 2:
            body.requires_grad_(True)
        if epoch == 3 and step == 3:
            optimizer.add_param_group({"params": extra.parameters(), "lr": 1e-3})
        out = model(xb) + (extra(xb) if epoch > 2 else 0)
        loss = cross_entropy(out, yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if epoch == 3:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model = nn.ModuleList([model, extra])
"""
CELLS = {
    "closure": CLOSURE,
    "gan": GAN,
    "shared": SHARED,
    "thawed": THAWED,
    "sgd": SGD,
    "adam-clipped": ADAM_CLIPPED,
    "two-passes": TWO_PASSES,
    "accumulated": ACCUMULATED,
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_the_loss_curve_is_that_of_one_device(rig2: Rig, cell: str) -> None:
    expected = rig2.plain(cell)
    run = rig2.train(cell)
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE
    rig2.assert_same_weights("model")
