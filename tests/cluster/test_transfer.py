"""Large objects between the notebook and the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
import torch

import dtkit
import dtkit.driver.transfer.verbs
from dtkit.errors import InvalidInputError

MADE = """
import numpy as np, torch
from torch import nn
torch.manual_seed(0)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4000, 100)
        self.head = nn.Linear(100, 4000)
        self.head.weight = self.embed.weight
        self.register_buffer("ones", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0))
        self.names = {"a": np.arange(200_000.0), "rank": rank}

model = Tied()
model.view = model.embed.weight.detach()[5:9].t()
check = [float(model.embed.weight.detach().double().sum()), float(model.view.sum())]
"""


def assert_arrived(model: Any, check: list[float], rank: int) -> None:
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, torch.nn.Parameter)
    assert model.embed.weight.requires_grad
    assert model.ones.tolist() == [1.0] * 3
    assert model.empty.shape == (0,)
    assert model.view.shape == (100, 4)
    assert model.view.data_ptr() == model.embed.weight[5].data_ptr()
    assert [float(model.embed.weight.detach().double().sum()), float(model.view.sum())] == check
    assert model.names["rank"] == rank
    np.testing.assert_array_equal(model.names["a"], np.arange(200_000.0))
    model.names["a"][0] = 1.0  # what arrives can be written to
    model.embed.weight.data.zero_()


@pytest.mark.parametrize("is_here", [True, False], ids=["socket", "pieces"])
def test_a_model_arrives_as_it_is(
    session2: dtkit.Session,
    monkeypatch: pytest.MonkeyPatch,
    is_here: bool,  # noqa: FBT001
) -> None:
    session2.execute(MADE)
    if not is_here:
        monkeypatch.setattr(dtkit.driver.transfer.verbs.platform, "node", lambda: "elsewhere")
        monkeypatch.setattr(dtkit.driver.transfer.verbs, "_PIECE", 100_000)
    check = session2.pull("check").value
    pulled = session2.pull("model", rank=1)
    assert pulled.num_bytes > 4000 * 100 * 4 + 200_000 * 8
    assert pulled.num_bytes < 1.1 * (4000 * 100 * 4 + 200_000 * 8)  # tied weights go once
    assert_arrived(pulled.value, check, 1)
    session2.push({"back": session2.pull("model").value})
    result = session2.execute(
        "float(back.embed.weight.detach().double().sum()) == check[0]"
    ).results
    assert result == {0: "True", 1: "True"}


def test_what_does_not_fit_is_refused(
    session2: dtkit.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session2.execute("import torch; big = torch.zeros(1000_000)")
    memory = psutil.virtual_memory()._replace(available=4_100_000)
    monkeypatch.setattr(dtkit.driver.transfer.verbs.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(InvalidInputError, match=r"big has 3\.8 MiB, and 3\.9 MiB are free"):
        session2.pull("big")
    counted = "len(__import__('dtkit.engine.process.transfer', fromlist=['x'])._EXPORTED)"
    assert session2.execute(counted).results[0] == "0"


def test_what_cannot_be_carried_is_named(session2: dtkit.Session) -> None:
    session2.execute("import threading; lock = threading.Lock()")
    with pytest.raises(InvalidInputError, match=r"lock .* cannot be carried"):
        session2.pull("lock")
