"""Is a change more than noise? Arithmetic over the values of good nights and one new value. Pure.

A change is real where it exceeds both what noise explains and the least change worth a word:

    |change| > max(k * sqrt(s_new**2 + s_old**2), least)

Changes are relative. Of positive quantities (times, rates, bytes) the logarithm is taken, so that half the
throughput is as far away as twice; of losses, which may be 0 or less, the difference as a share of the value.

*Three good nights or more.* They say themselves how much nights differ: their standard deviation, together
with the kind's own ``prior`` as if that had been seen in ``PRIOR_NIGHTS`` nights more (the deviation of three
nights alone is, by luck, a fifth of the true one as often as 1 in 25). From six on the night farthest from
the middle is left out: one bad night must not blind the gate for ten. k is Student's t, one-sided 1 in 200,
with as many degrees of freedom. The new value is compared with the median of the last three: a single
night may have been a lucky one, and older ones are of older code.

*Fewer nights.* Nothing is known about nights: k is 3, and the least change is larger.

A run's own spread counts as well wherever it is larger: a machine that is busy today explains more.
``benchmarks/gate_power.py`` measures how often this is wrong in either direction (docs/regression-gates.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, variance
from typing import Literal, Protocol

Kind = Literal["worse", "better", "same"]

LEAST_NIGHTS = 3
# Older nights are of another machine room, driver, season.
MOST_NIGHTS = 10
# The new value is held against the median of so many: it follows accepted changes within two nights.
RECENT = 3
# More would make it slow to learn that a machine is noisy, fewer blind with three nights.
PRIOR_NIGHTS = 2
FEW_NIGHTS_K = 3.0
# The median of three varies by so much as one of them, in variance (normal noise).
MEDIAN_OF_THREE = 0.449
# Student's t, one-sided 1 in 200, by degrees of freedom.
STUDENT = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11)
# From six nights on the farthest is left out; the variance of the rest, times this, is that of all
# (simulated: 60,000 draws of normal noise).
TRIM_FROM = 6
TRIMMED = {6: 1.887, 7: 1.732, 8: 1.642, 9: 1.557, 10: 1.509}


class Measured(Protocol):
    """A metric of the report."""

    @property
    def value(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def better(self) -> str: ...
    @property
    def spread(self) -> float | None: ...


@dataclass(frozen=True)
class Kindred:
    """What is known beforehand about a kind of metric; all relative, 0.02 is 2 %.

    prior: sigma from night to night on a machine that does nothing else. least, least_alone: no change below
    is told, with three good nights or more, and with fewer. additive: differences, not ratios.
    """

    prior: float
    least: float
    least_alone: float
    additive: bool = False


# Clocks, temperature and where the allocator put things move a time by a few per cent between runs of the
# same code; a run that knows its own spread does not know that.
TIME = Kindred(prior=0.02, least=0.05, least_alone=0.10)
# Once is no measurement: compiling for the first time depends on the disk, the caches and the neighbours.
TIME_ONCE = Kindred(prior=0.06, least=0.10, least_alone=0.25)
# Of a process's own time a busy machine makes more as well, through caches and shared cores: a third was seen
# between runs of the same code with seven others per core.
TIME_CPU = Kindred(prior=0.08, least=0.10, least_alone=0.50)
# Allocations repeat; what varies is rounding, workspaces and what the allocator keeps.
MEMORY = Kindred(prior=0.005, least=0.02, least_alone=0.03)
# Same seeds, same data: kernels that add in another order move a loss in its last digits, which training
# enlarges.
LOSS = Kindred(prior=0.005, least=0.02, least_alone=0.02, additive=True)
# Batch sizes, graphs, recompiles: whole numbers that a repetition gives again.
COUNT = Kindred(prior=0.0, least=0.01, least_alone=0.01, additive=True)


def kindred(name: str, metric: Measured) -> Kindred:
    """By unit and, for losses, which have none, by name."""
    if metric.unit in ("bytes", "B"):
        return MEMORY
    if "loss" in name:
        return LOSS
    if metric.unit in ("samples", "graphs", "count"):
        return COUNT
    if name.endswith("_cpu_seconds"):
        return TIME_CPU
    return TIME if metric.spread is not None else TIME_ONCE


@dataclass(frozen=True)
class Judged:
    """old: what the new value was held against. change: relative, new by old less 1; noise, least: likewise,
    how much of a change noise explains in the bad direction, and how little is not told. nights: how many
    good ones it is from.
    """

    kind: Kind
    old: float
    new: float
    change: float
    noise: float
    least: float
    nights: int


def judge(name: str, old: Sequence[Measured], new: Measured) -> Judged:
    """``old``: the metric in good nights, the oldest first. Raises ValueError where it cannot be compared."""
    found = [one for one in old if one.value is not None and math.isfinite(one.value)][-MOST_NIGHTS:]
    if not found:
        raise ValueError("the earlier value is not a number")
    if {(one.unit, one.better) for one in found} != {(new.unit, new.better)}:
        first = next(one for one in found if (one.unit, one.better) != (new.unit, new.better))
        raise ValueError(
            f"it was in {first.unit}, better {first.better}; now {new.unit}, better {new.better}"
        )
    values = [float(one.value or 0.0) for one in found]
    enough = len(values) >= LEAST_NIGHTS
    reference = median(values[-RECENT:]) if enough else values[-1]
    if new.value is None or not math.isfinite(new.value):
        return Judged("worse", reference, math.nan, math.nan, 0.0, 0.0, len(values))
    kind = kindred(name, new if new.spread is None else found[-1])
    additive = kind.additive or min(*values, new.value) <= 0
    scale = _scale(reference, new.value)
    places = [_place(value, additive, scale) for value in values]
    change = _place(new.value, additive, scale) - _place(reference, additive, scale)
    own_new = _own(new, additive, scale)
    if enough:
        sigma, freedom = _between(places, kind.prior)
        s_new = max(sigma, own_new)
        noise = STUDENT[freedom - 1] * math.sqrt(s_new**2 + MEDIAN_OF_THREE * sigma**2)
        least = kind.least
    else:
        noise = FEW_NIGHTS_K * math.hypot(own_new, _own(found[-1], additive, scale))
        least = kind.least_alone
    limit = max(noise, least if additive else math.log1p(least))
    return Judged(
        _kind(change, limit, new.better),
        reference,
        new.value,
        _share(change, additive),
        abs(_share(-noise if new.better == "higher" else noise, additive)),
        least,
        len(values),
    )


def _kind(change: float, limit: float, better: str) -> Kind:
    if not abs(change) > limit:
        return "same"
    if better == "equal":
        return "worse"
    return "better" if (change > 0) == (better == "higher") else "worse"


def _between(places: Sequence[float], prior: float) -> tuple[float, int]:
    """Sigma from night to night, and its degrees of freedom."""
    number = len(places)
    if number >= TRIM_FROM:
        middle = median(places)
        kept = sorted(places, key=lambda place: abs(place - middle))[:-1]
        seen, freedom = TRIMMED[number] * variance(kept), number - 2
    else:
        seen, freedom = variance(places), number - 1
    together = PRIOR_NIGHTS + freedom
    return math.sqrt((PRIOR_NIGHTS * prior**2 + freedom * seen) / together), together


def _place(value: float, additive: bool, scale: float) -> float:
    return value / scale if additive else math.log(value)


def _scale(reference: float, new: float) -> float:
    """What differences are shares of: the reference, or where that is 0 the new value."""
    return abs(reference) or abs(new) or 1.0


def _own(metric: Measured, additive: bool, scale: float) -> float:
    """A run's own spread, relative; 0 where it knows none."""
    if not metric.spread or not math.isfinite(metric.spread):
        return 0.0
    return abs(metric.spread) / (scale if additive else abs(metric.value or scale))


def _share(change: float, additive: bool) -> float:
    return change if additive else math.expm1(min(change, 700.0))
