"""Compressors by themselves: ranks are played by objects, the collective by torch.stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from dtkit.compression import GATHERED, METHODS, Compression
from dtkit.engine.reduce.compressors import Compressor, Layout, base, make_compressor, rehearse
from dtkit.engine.reduce.compressors.base import Momentum
from dtkit.engine.reduce.momentum import MomentumCorrection

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPES = (torch.Size([70, 40]), torch.Size([70]), torch.Size([8, 4, 3, 3]), torch.Size([]))
SPECS = ["fp16", "bf16", "int8", "int4", "sign", "topk:0.05", "powersgd:2"]
WITH_FEEDBACK = SPECS[2:]


class Ranks:
    """One bucket's compressors on all ranks."""

    def __init__(
        self, spec: str, num_ranks: int = 3, momentum: float = 0.0, *, is_nesterov: bool = False
    ) -> None:
        layout = Layout(
            SHAPES, torch.float32, torch.device("cpu"), num_ranks,
            momentum=lambda: Momentum(momentum, is_nesterov),
        )  # fmt: skip
        made = [make_compressor(Compression.parse(spec), layout) for _ in range(num_ranks)]
        self.each: list[Compressor] = [one for one in made if one is not None]
        if spec == "sign":  # what follows is about one bit, not about its warm-up in eight
            for compressor in self.each:
                compressor.load([{"num_passes": 1000}] * len(SHAPES))

    def average(
        self, grads: Sequence[torch.Tensor], absent: Sequence[int] = ()
    ) -> tuple[torch.Tensor, int]:
        """Return the average, and the bytes of a payload."""
        sent = [list(c.compress(g)) for c, g in zip(self.each, grads, strict=True)]
        received = [torch.stack(pieces) for pieces in zip(*sent, strict=True)]
        if self.each[0].is_summed:
            received = [pieces.sum(0, keepdim=True) for pieces in received]
        outs = [torch.empty_like(grads[0]) for _ in self.each]
        for compressor, out in zip(self.each, outs, strict=True):
            compressor.average(received, out, absent)
        for out in outs[1:]:
            assert torch.equal(out.nan_to_num(7.0), outs[0].nan_to_num(7.0))
        return outs[0], sum(piece.nbytes for piece in sent[0])


def gradients(num_ranks: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num = sum(shape.numel() for shape in SHAPES)
    return [torch.randn(num, generator=generator) for _ in range(num_ranks)]


def memory(ranks: Ranks) -> list[Any]:
    """Everything that is remembered, as comparable values."""
    return [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
        for compressor in ranks.each
        for entry in compressor.state()
    ]


def test_what_is_gathered_is_known_to_the_driver() -> None:
    gathered = {s.partition(":")[0] for s in SPECS if not Ranks(s).each[0].is_summed}
    assert gathered == set(GATHERED)


def test_every_method_is_tried_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(METHODS) - {"none"}


@pytest.mark.parametrize(("spec", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2), ("int8", 2e-2)])
def test_fine_methods_give_the_mean_at_once(spec: str, tolerance: float) -> None:
    grads = gradients()
    average, _ = Ranks(spec).average(grads)
    mean = torch.stack(grads).mean(0)
    assert (average - mean).norm() < tolerance * mean.norm()


@pytest.mark.parametrize("spec", WITH_FEEDBACK)
def test_what_is_left_out_comes_later(spec: str) -> None:
    """What was sent in all is what there was in all, but for a residual that does not grow."""
    ranks, grads = Ranks(spec), gradients()
    mean = torch.stack(grads).mean(0)
    errors, total = [], torch.zeros_like(mean)
    for i in range(1, 401):
        total += ranks.average(grads)[0]
        errors.append(float((total / i - mean).norm() / mean.norm()))
    assert errors[-1] < 0.1
    assert errors[-1] < 0.8 * errors[199]


@pytest.mark.parametrize(
    ("spec", "ratio"), [("fp16", 2), ("bf16", 2), ("int8", 3.9), ("int4", 7.5), ("sign", 25)]
)
def test_payloads_are_as_small_as_they_should_be(spec: str, ratio: float) -> None:
    layout = Layout((torch.Size([1 << 16]),), torch.float32, torch.device("cpu"), 2)
    compressor = make_compressor(Compression.parse(spec), layout)
    assert compressor is not None
    compressor.load([{"num_passes": 1000}])
    (payload,) = compressor.compress(torch.randn(1 << 16))
    assert 4 * (1 << 16) / payload.nbytes >= ratio


def test_topk_sends_less_and_less_until_its_ratio_is_reached() -> None:
    ranks = Ranks("topk:0.01")
    sizes = [ranks.average(gradients(seed=i))[1] for i in range(230)]
    num = sum(shape.numel() for shape in SHAPES)
    assert sizes[0] == 8 * round(0.25 * num)
    assert sizes[200:] == [8 * round(0.01 * num)] * 30
    assert sizes[:201] == sorted(sizes[:201], reverse=True)


def test_sign_has_eight_bits_at_first() -> None:
    ranks = Ranks("sign")
    for compressor in ranks.each:
        compressor.load([{"num_passes": 198}] * len(SHAPES))
    sizes = [ranks.average(gradients(seed=i))[1] for i in range(4)]
    assert sizes[0] == sizes[1] > 7 * sizes[2]
    assert sizes[2] == sizes[3]


@pytest.mark.usefixtures("digits")  # an optimizer sets a variable of torch's compiler
def test_whoever_dampens_gradients_keeps_the_momentum() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    for dampening, left in ((0.0, 0.0), (0.5, 0.9)):
        correction = MomentumCorrection()
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, dampening=dampening)
        correction.made(optimizer)
        assert correction.of(weight)().factor == 0.9 - left
        correction.suspend(optimizer)
        assert optimizer.param_groups[0]["momentum"] == left
        correction.close()
        assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("is_nesterov", [False, True])
def test_topk_of_everything_with_momentum_is_sgd(*, is_nesterov: bool) -> None:
    ranks = Ranks("topk:1.0", momentum=0.9, is_nesterov=is_nesterov)
    weight = torch.nn.Parameter(torch.zeros(gradients()[0].numel()))
    plain = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=is_nesterov)
    for i in range(5):
        grads = gradients(seed=i)
        weight.grad = torch.stack(grads).mean(0)
        before = weight.detach().clone()
        plain.step()
        average, _ = ranks.average(grads)
        torch.testing.assert_close(average, before - weight.detach())


def test_topk_finds_the_largest_of_many() -> None:
    layout = Layout((torch.Size([1 << 20]),), torch.float32, torch.device("cpu"), 1)
    compressor = make_compressor(Compression.parse("topk:0.01"), layout)
    assert compressor is not None
    compressor.load([{"num_passes": 1000}])
    grads = torch.randn(1 << 20)
    out = torch.empty_like(grads)
    rehearse(compressor, grads, out)
    num = round(0.01 * (1 << 20))
    expected = torch.zeros_like(grads)
    places = grads.abs().topk(num).indices
    expected[places] = grads[places]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_finite_stays_so_and_is_not_remembered(spec: str, bad: float) -> None:
    ranks = Ranks(spec)
    for seed in range(3):
        ranks.average(gradients(seed=seed))
    before = memory(ranks)
    grads = gradients(seed=9)
    grads[1][1234] = bad
    average, _ = ranks.average(grads)
    assert not average[1234].isfinite()
    after = memory(ranks)
    for old, new in zip(before, after, strict=True):
        old.pop("num_passes", None), new.pop("num_passes", None)
    assert after == before
    assert ranks.average(gradients(seed=10))[0].isfinite().all()


@pytest.mark.parametrize("spec", WITH_FEEDBACK)
def test_a_parameter_that_no_rank_used_keeps_its_residual(spec: str) -> None:
    ranks = Ranks(spec)
    ranks.average(gradients())
    before = memory(ranks)
    grads = gradients(seed=1)
    for grad in grads:
        grad[:2800] = 0.0  # the first parameter's
    ranks.average(grads, absent=[0])
    after = memory(ranks)
    num = len(SHAPES)
    assert [m["residual"] for m in after[::num]] == [m["residual"] for m in before[::num]]
    assert [m["residual"] for m in after[2::num]] != [m["residual"] for m in before[2::num]]


@pytest.mark.parametrize("spec", WITH_FEEDBACK)
def test_another_goes_on_where_one_left_off(spec: str) -> None:
    first, second = (Ranks(spec, momentum=0.9) for _ in range(2))
    for seed in range(4):
        first.average(gradients(seed=seed))
    for old, new in zip(first.each, second.each, strict=True):
        new.load(old.state())
    for seed in range(4, 8):
        expected, _ = first.average(gradients(seed=seed))
        got, _ = second.average(gradients(seed=seed))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("spec", WITH_FEEDBACK)
def test_what_is_remembered_follows_the_scale_of_the_gradients(spec: str) -> None:
    plain, scaled = Ranks(spec), Ranks(spec)
    plain.average(gradients())
    scaled.average(gradients())
    for compressor in scaled.each:
        compressor.rescale(4.0)
    expected, _ = plain.average(gradients(seed=1))
    got, _ = scaled.average([4.0 * g for g in gradients(seed=1)])
    torch.testing.assert_close(got, 4.0 * expected)


def test_integers_and_none_are_sent_as_they_are() -> None:
    layout = Layout((torch.Size([4]),), torch.float32, torch.device("cpu"), 2)
    assert make_compressor(Compression(), layout) is None


@pytest.mark.parametrize("spec", ["int8", "int4", "sign"])
def test_pieces_make_no_difference(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ranks(spec)
    monkeypatch.setattr(base, "SEGMENT", 1024)
    pieces = Ranks(spec)
    for seed in range(3):
        for absent in ((), (0,)):
            expected, _ = whole.average(gradients(seed=seed), absent)
            got, _ = pieces.average(gradients(seed=seed), absent)
            assert torch.equal(got, expected)
    assert memory(pieces) == memory(whole)
    assert len(list(pieces.each[0].compress(gradients()[0]))) > 1
