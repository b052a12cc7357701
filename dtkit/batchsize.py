"""Small, medium or large: where a batch stands against the gradient noise scale, and what follows.

source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018: to the same loss,
steps go with 1 + noise / batch and samples with 1 + batch / noise. The learning rate: Goyal et
al., Accurate, Large Minibatch SGD, 2017 (linear, with warm-up); square root for Adam's family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["BatchPlacement", "place_batch"]

_WIDTH = 4
"""A batch within this factor of the noise scale is medium; at it both costs are twice the least."""
_MEANING = {
    "small": "few samples to a given loss and little memory, but unsteady steps and many of them",
    "medium": "a fair trade of steps for samples",
    "large": "fast where the hardware is, but most of each batch says what the rest of it says",
}
_SQUARE_ROOT = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "RMSprop", "Adagrad")


@dataclass(frozen=True, slots=True)
class BatchPlacement:
    """A run's batch in the table of small, medium and large ones, and a proposal.

    Attributes:
        noise_scale: in samples.
        batch: samples in a step, of all ranks together.
        zone: small, medium or large.
        proposed: the batch to try; the same one if it is medium.
        lr: the learning rate that goes with it; NaN: not known.
        rule: how that was scaled: linear or square root.
    """

    noise_scale: float
    batch: int
    zone: str
    proposed: int
    lr: float
    rule: str

    @property
    def steps_ratio(self) -> float:
        """How many times the steps the proposed batch takes to the same loss."""
        return (1 + self.noise_scale / self.proposed) / (1 + self.noise_scale / self.batch)

    @property
    def samples_ratio(self) -> float:
        """How many times the samples it takes."""
        return (1 + self.proposed / self.noise_scale) / (1 + self.batch / self.noise_scale)

    def __str__(self) -> str:
        text = (
            f"batch of {self.batch:,} is {self.zone} for a gradient noise scale of about "
            f"{_rounded(self.noise_scale):,} samples: {_MEANING[self.zone]}"
        )
        if self.proposed == self.batch:
            return text
        text += (
            f". To try: {self.proposed:,}, for about {self.steps_ratio:.2g} × the steps and "
            f"{self.samples_ratio:.2g} × the samples to the same loss"
        )
        if math.isnan(self.lr):
            return text
        warmup = " with a warm-up" if self.rule == "linear" and self.proposed > self.batch else ""
        return f"{text}, learning rate {self.lr:.3g} ({self.rule} scaling{warmup})"


def place_batch(
    noise_scale: float, batch: int, *, lr: float = math.nan, optimizer: str = ""
) -> BatchPlacement:
    """Return where a batch stands, and the batch and learning rate to try.

    Args:
        noise_scale: in samples, above 0.
        batch: samples in a step, of all ranks together.
        lr: the learning rate that it was trained with.
        optimizer: the class of the optimizer; of Adam's family the rule is another.
    """
    zone = "medium"
    if batch * _WIDTH < noise_scale:
        zone = "small"
    elif batch > noise_scale * _WIDTH:
        zone = "large"
    # By powers of two: what the scale is known to is not better than that.
    exponent = 0 if zone == "medium" else math.floor(math.log2(noise_scale / batch))
    proposed = max(1, math.floor(batch * 2.0**exponent))
    rule = "square root" if optimizer in _SQUARE_ROOT else "linear"
    factor = proposed / batch
    scaled = lr * (math.sqrt(factor) if rule == "square root" else factor)
    return BatchPlacement(noise_scale, batch, zone, proposed, scaled, rule)


def _rounded(value: float) -> int:
    """Return two significant digits."""
    num_digits = math.floor(math.log10(max(value, 1.0)))
    return round(round(value, 1 - num_digits))
