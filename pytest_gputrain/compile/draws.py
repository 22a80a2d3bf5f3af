"""Two samples of numbers that depend on chance: may they come from the same program? Imports no torch.

For dropout whose random numbers differ between eager and compiled, where single steps cannot be compared.
Bars are far out: a healthy program is looked at through many numbers, and none of them may raise the alarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

# Standard errors. One pair of samples in about 10 million is as far apart by chance, among a few hundred that
# a case has, and small samples have heavier tails.
FAR = 6.5
# A deviation varies more than normal numbers' does where tails are heavy.
TAILS = 1.5
NOTHING = 1e-12


@dataclass(frozen=True)
class Difference:
    """errors: how many standard errors the means are apart. spread: ratio of the
    standard deviations; allowed: how large it may be, or how small its inverse."""

    errors: float
    spread: float
    allowed: float
    one: float
    other: float

    @property
    def real(self) -> bool:
        return self.errors > FAR or not 1 / self.allowed < self.spread < self.allowed


def differ(one: Sequence[float], other: Sequence[float], rounding: float) -> Difference:
    """Compare two samples of at least two numbers each.

    rounding: what the numbers may be off, relative to the first mean, without chance. Where neither sample
    varies by more than that, a difference within it is none.
    """
    first, second = fmean(one), fmean(other)
    exact = rounding * abs(first) + NOTHING
    deviations = [math.sqrt(variance(sample)) for sample in (one, other)]
    error = math.hypot(deviations[0] / math.sqrt(len(one)), deviations[1] / math.sqrt(len(other)))
    errors = max(0.0, abs(second - first) - exact) / (error + exact)
    allowed = math.exp(FAR * TAILS / math.sqrt(min(len(one), len(other)) - 1))
    return Difference(errors, (deviations[1] + exact) / (deviations[0] + exact), allowed, first, second)
