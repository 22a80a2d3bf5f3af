"""Two loss curves: is the second the first, within 5 % and what rounding does to it by itself? Imports no
torch.

Training amplifies differences: two eager runs whose weights differ in the last bit part as well, slowly or,
with a large learning rate, fast. What such controls come to is no fault of compiling, so the band around the
eager curve is as much wider. Curves are averaged over a window first, because single losses of small batches
jump.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

BAND = 0.05
WINDOW = 10
# Of the first loss: what a curve has come down to is compared with at least this, or nothing that overfits a
# few batches to zero could be compared at all.
FLOOR = 0.05
# Two or three controls do not show the widest that rounding can do.
CONTROLS = 3.0
# Beyond this the eager runs themselves are so far apart that nothing is told by comparing.
CHAOS = 0.25


@dataclass(frozen=True)
class Parting:
    """How far the curves are apart. at: the first step at which the band is left, None where it never is.

    worst, end: relative distance at its largest and at the last step. allowed: at ``at``, or at the last
    step. judged: steps that could be compared; fewer than given where the eager runs part by themselves.
    """

    at: int | None
    worst: float
    end: float
    allowed: float
    judged: int
    eager: float
    compiled: float


def part(eager: Sequence[float], compiled: Sequence[float], controls: Sequence[Sequence[float]]) -> Parting:
    """Compare loss curves of equal length, one loss a step. Raises ValueError where lengths differ."""
    lengths = {len(curve) for curve in (eager, compiled, *controls)}
    if len(lengths) != 1 or not eager:
        raise ValueError(f"loss curves of {sorted(lengths)} steps; they must be equally long, 1 or more")
    one, other = smooth(eager), smooth(compiled)
    floor = FLOOR * abs(eager[0])
    apart = distances(one, other, floor)
    natural = [distances(one, smooth(control), floor) for control in controls]
    widest, worst, allowed, judged = 0.0, 0.0, BAND, 0
    for step, distance in enumerate(apart):
        widest = max([widest, *(curve[step] for curve in natural)])
        if widest > CHAOS:
            break
        judged, allowed = step + 1, BAND + CONTROLS * widest
        worst = max(worst, distance)
        if distance > allowed:
            return Parting(step, worst, distance, allowed, judged, one[step], other[step])
    last = max(0, judged - 1)
    return Parting(None, worst, apart[last], allowed, judged, one[last], other[last])


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each step's loss and of those up to ``WINDOW`` - 1 before it."""
    return [fmean(losses[max(0, step + 1 - WINDOW) : step + 1]) for step in range(len(losses))]


def distances(one: Sequence[float], other: Sequence[float], floor: float) -> list[float]:
    """By step, relative to the first curve or to ``floor`` where that is larger; infinite for what is no
    number.
    """
    return [_distance(a, b, floor) for a, b in zip(one, other, strict=True)]


def _distance(one: float, other: float, floor: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    size = max(abs(one), floor)
    return abs(other - one) / size if size else (0.0 if one == other else math.inf)
