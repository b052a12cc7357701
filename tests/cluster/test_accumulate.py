"""`--accumulate K`: K steps of an unedited cell train as one of a K times larger batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from rig import relative_error

from dtkit.errors import RankError
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from rig import Rig

TOLERANCE = 2e-5

CELL = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=BATCH, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=2e-2, total_steps=3 * (1797 // 60 + 1)
)
losses = []
for epoch in range(3):
    for xb, yb in loader:
        ZERO_BEFORE
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)
        optimizer.step()
        scheduler.step()
        ZERO_AFTER
        losses.append(loss.item())
"""
ZEROING = {
    "before": ("optimizer.zero_grad()", "pass"),
    "after": ("pass", "model.zero_grad()"),
    "to zero": ("optimizer.zero_grad(set_to_none=False)", "pass"),
}


def cell(batch: int, zeroing: str = "before") -> str:
    before, after = ZEROING[zeroing]
    text = CELL.replace("BATCH", str(batch))
    return text.replace("ZERO_BEFORE", before).replace("ZERO_AFTER", after)


@pytest.mark.parametrize("zeroing", ZEROING)
def test_three_batches_of_20_are_one_of_60(rig2: Rig, zeroing: str) -> None:
    """1797 samples: 90 batches of 20 (the last of 17), 30 of 60 (the last of 57)."""
    expected = rig2.plain(cell(60))
    run = rig2.session.train(cell(20, zeroing), recipe=Recipe(batch="global", accumulate=3))
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE
    rig2.assert_same_weights("model")
    assert rig2.common("scheduler.last_epoch") == expected["scheduler"].last_epoch
    assert rig2.common("len(losses)") == 3 * 90
    assert run.history["samples_per_s"].min() > 0


def test_the_last_group_of_an_epoch_is_smaller(rig2: Rig) -> None:
    """36 batches of 50, the last of 47, in groups of 5: an epoch ends with one batch alone."""
    text = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=50, shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(2):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
"""
    grouped = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=50, shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
losses = []
for epoch in range(2):
    batches = list(loader)
    for i in range(0, len(batches), 5):
        xb = torch.cat([x for x, _ in batches[i:i + 5]])
        yb = torch.cat([y for _, y in batches[i:i + 5]])
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
"""
    expected = rig2.plain(grouped)
    run = rig2.session.train(text, recipe=Recipe(batch="global", accumulate=5))
    assert run.history.num_steps == 2 * 8
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE


def test_one_communication_for_each_step(rig2: Rig) -> None:
    once = rig2.session.train(cell(60), recipe=Recipe(batch="global"))
    run = rig2.session.train(cell(20), recipe=Recipe(batch="global", accumulate=3))
    assert np.array_equal(run.history["sent_bytes"], once.history["sent_bytes"])


def test_a_schedule_that_counts_epochs_counts_epochs(rig2: Rig) -> None:
    text = """
loader = DataLoader(train_set, batch_size=100, shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1),
    torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)], milestones=[2])
rates = []
for epoch in range(4):
    for xb, yb in loader:
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()
        optimizer.step()
    rates.append(optimizer.param_groups[0]["lr"])
    scheduler.step()
"""
    rig2.session.train(text, recipe=Recipe(accumulate=4))
    expected = rig2.plain(text)["rates"]
    assert rig2.common("rates") == expected


def test_two_optimizers_with_gradients_of_each_other(rig2: Rig) -> None:
    """The generator's pass leaves gradients in the discriminator, which zeroing must remove."""
    text = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=BATCH, shuffle=True)
netG, netD = nn.Linear(64, 64), nn.Linear(64, 1)
optimizerD = torch.optim.SGD(netD.parameters(), lr=0.05)
optimizerG = torch.optim.SGD(netG.parameters(), lr=0.05)
criterion = nn.BCEWithLogitsLoss()
for epoch in range(2):
    for real, _ in loader:
        netD.zero_grad()
        errD = criterion(netD(real), torch.ones(len(real), 1))
        errD.backward()
        fake = netG(real)
        errD = criterion(netD(fake.detach()), torch.zeros(len(real), 1))
        errD.backward()
        optimizerD.step()
        netG.zero_grad()
        # D's weights at the time of the step, not of the accumulated ones.
        criterion(real @ netG.weight.t(), torch.ones(len(real), 64)).backward()
        netD.bias.grad = None
        optimizerG.step()
"""
    expected = rig2.plain(text.replace("BATCH", "60"))
    rig2.session.train(text.replace("BATCH", "20"), recipe=Recipe(batch="global", accumulate=3))
    for name in ("netD", "netG"):
        got = np.array(rig2.common(f"{name}.weight.tolist()"))
        assert np.allclose(got, expected[name].weight.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_steps_without_a_loader_are_not_lost(rig2: Rig) -> None:
    text = """
model = nn.Linear(64, 10)
with torch.no_grad():
    model.weight.zero_(), model.bias.zero_()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for i in range(STEPS):
    optimizer.zero_grad()
    (model(X[i]).sum() * (i + 1)).backward()
    optimizer.step()
"""
    run = rig2.session.train(text.replace("STEPS", "5"), recipe=Recipe(accumulate=4))
    assert run.history.num_steps == 2
    # 1, 2, 3, 4 make one step, 5 another.
    assert rig2.common("model.bias.tolist()") == pytest.approx([-(1 + 2 + 3 + 4) / 4 - 5] * 10)
    assert any("the last 1 of 4 accumulated steps" in note for note in run.notes)
    run = rig2.session.train(text.replace("STEPS", "8"), recipe=Recipe(accumulate=4))
    assert not any("accumulated steps" in note for note in run.notes)


def test_an_iterable_without_a_length_ends_its_group(rig2: Rig) -> None:
    text = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from zip(X[:70], y[:70])
loader = DataLoader(Stream(), batch_size=10)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
num_seen = 0
for xb, yb in loader:
    num_seen += len(xb)
    optimizer.zero_grad()
    cross_entropy(model(xb), yb).backward()
    optimizer.step()
"""
    run = rig2.session.train(text, recipe=Recipe(accumulate=3))
    assert run.history.num_steps == 3
    assert rig2.common("num_seen") == 70
    assert not any("accumulated steps" in note for note in run.notes)


def test_the_cells_own_grad_scaler_is_held_back_too(rig2: Rig) -> None:
    text = """
torch.manual_seed(0)
loader = DataLoader(train_set, batch_size=BATCH, shuffle=True)
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
losses = []
for epoch in range(2):
    for xb, yb in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(xb), yb)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
"""
    expected = rig2.plain(text.replace("BATCH", "60"))
    run = rig2.session.train(
        text.replace("BATCH", "20"), recipe=Recipe(batch="global", accumulate=3)
    )
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE
    assert rig2.common("int(scaler._growth_tracker)") == 60


def test_it_works_on_one_rank(rig2: Rig) -> None:
    expected = rig2.plain(cell(60))
    run = rig2.session.train(cell(20), recipe=Recipe(accumulate=3), ranks=[1])
    assert relative_error(run.history["loss"], expected["losses"]) < TOLERANCE


def test_what_computes_its_loss_in_the_step_is_refused(rig2: Rig) -> None:
    text = """
model = nn.Linear(64, 10)
optimizer = torch.optim.LBFGS(model.parameters())
def closure():
    optimizer.zero_grad()
    loss = cross_entropy(model(X), y)
    loss.backward()
    return loss
optimizer.step(closure)
"""
    with pytest.raises(RankError, match="--accumulate: this optimizer's step computes the loss"):
        rig2.session.train(text, recipe=Recipe(accumulate=2))


def test_a_cell_with_ddp_is_told_to_accumulate_itself(rig2: Rig) -> None:
    text = "model = nn.parallel.DistributedDataParallel(nn.Linear(64, 10))"
    with pytest.raises(RankError, match=r"no_sync\(\)"):
        rig2.session.train(text, recipe=Recipe(accumulate=2))
