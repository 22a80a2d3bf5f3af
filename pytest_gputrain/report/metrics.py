"""Metrics as checks hand them over: a value, its unit, which way is better, and how sure it is.

``spread`` is the robust sigma with which the value would come out if it were measured again, as far as one
run can tell. It is not that of single steps, nor that divided by the root of their number: neighbouring steps
are slow together (a clock, a neighbour on the machine), so a root of 300 promises far too much. It is that of
the medians of a few blocks of steps. What differs from one night to the next no run can tell: ``noise``
learns that from nights. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

Better = Literal["higher", "lower", "equal"]

# Fewer blocks say little about how they differ, and smaller ones little about anything but a step.
MOST_BLOCKS, LEAST_BLOCK = 8, 4
# A normal distribution's sigma is so many times its median absolute deviation.
MAD_TO_SIGMA = 1.4826


def measured(samples: Sequence[float], *, unit: str, better: Better) -> dict[str, Any]:
    """The median of the samples, in the order in which they came, as a metric of ``figures["metrics"]``.

    Warm-up is left out by the caller. Samples that are not finite are dropped. Raises ValueError for none.
    """
    finite = [float(value) for value in samples if math.isfinite(value)]
    if not finite:
        raise ValueError(f"{len(samples)} samples, none of them finite; a metric needs at least one")
    return _metric(median(finite), unit, better, spread_of(finite), len(finite))


def once(value: float, *, unit: str, better: Better, spread: float | None = None) -> dict[str, Any]:
    """A figure measured once, or whose ``spread`` (its absolute robust sigma) is known otherwise.

    Give 0.0 where a repetition gives the same: what is counted, not timed.
    """
    return _metric(value, unit, better, spread, 1)


def spread_of(samples: Sequence[float]) -> float | None:
    """The robust sigma of the samples' median, by blocks of neighbours; None for fewer than 3 samples."""
    number = len(samples)
    if number < 3:
        return None
    blocks = min(MOST_BLOCKS, number // LEAST_BLOCK)
    if blocks < 3:
        return robust_sigma(samples)
    edges = [number * place // blocks for place in range(blocks + 1)]
    return robust_sigma([median(samples[edges[i] : edges[i + 1]]) for i in range(blocks)])


def robust_sigma(values: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation, and never 0 while most of the values differ.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("the spread of no values; give at least one")
    middle = median(values)
    return MAD_TO_SIGMA * median(abs(value - middle) for value in values)


def metrics_in(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a check handed over, empty where it measures nothing that nights are compared by."""
    found = figures.get("metrics")
    return dict(found) if isinstance(found, Mapping) else {}


def _metric(value: float, unit: str, better: Better, spread: float | None, samples: int) -> dict[str, Any]:
    return {"value": value, "unit": unit, "better": better, "spread": spread, "samples": samples}
