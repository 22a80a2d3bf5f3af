"""Where a curve through a few measured peaks reaches capacity: a line, or a parabola if they bend upward."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from pytest_gputrain.batch.evidence import Evidence

Point = tuple[float, float]
# Two peaks nearer than this share of the batch show noise and the allocator's blocks rather than the slope.
APART = 0.1


def crossing(points: Sequence[Point], capacity: float, *, proportional: bool = False) -> float | None:
    """Return the x at which the curve through ``points``, (x, peak) by rising x, reaches ``capacity``.

    None where they do not rise, or are too few; with ``proportional``, one point or none is enough, since the
    peak is x times a factor, 1 until measured.
    """
    chosen = _nearest(points, capacity)
    if len(chosen) < 2:
        if not proportional:
            return None
        x, peak = chosen[0] if chosen else (1.0, 1.0)
        return x * capacity / peak if peak > 0 else None
    if len(chosen) > 2 and (bent := _parabola(chosen, capacity)) is not None:
        return bent
    slopes = (_slope(chosen[0], other) for other in chosen[1:])
    slope = next((slope for slope in slopes if slope > 0), None)  # the nearer two may share a step
    return chosen[0][0] + (capacity - chosen[0][1]) / slope if slope else None


def _nearest(points: Sequence[Point], capacity: float) -> list[Point]:
    """Up to three points, the nearest to the crossing first, far enough from each other to show a slope."""
    under = max((number for number, (_, peak) in enumerate(points) if peak <= capacity), default=-1)
    around = [*points[under + 1 : under + 2], *reversed(points[: under + 1])] if under >= 0 else list(points)
    chosen = around[:1]
    for x, peak in around[1:]:
        if abs(x - chosen[-1][0]) >= APART * max(x, chosen[-1][0]):
            chosen.append((x, peak))
    if len(chosen) == 1 and len(around) > 1:
        chosen.append(max(around, key=lambda point: abs(point[0] - chosen[0][0])))
    return chosen[:3]


def _slope(one: Point, other: Point) -> float:
    return (one[1] - other[1]) / (one[0] - other[0]) if one[0] != other[0] else 0.0


def _parabola(chosen: Sequence[Point], capacity: float) -> float | None:
    """Where the parabola through three points reaches capacity; None if it bends downward or never does."""
    first, second, third = chosen
    bend = (_slope(first, second) - _slope(second, third)) / (first[0] - third[0])
    slope = _slope(first, second) + bend * (first[0] - second[0])
    gap = capacity - first[1]
    square = slope * slope + 4 * bend * gap
    if bend <= 0 or slope <= 0 or square < 0:
        return None
    return first[0] + 2 * gap / (slope + math.sqrt(square))


class Scale:
    """The scale on which peaks are taken for a line: the batch size, or the peak that somebody predicted."""

    def __init__(self, predicted: Callable[[int], float] | None) -> None:
        self._predicted = predicted
        self._values: dict[int, float] = {}

    def value(self, size: int) -> float:
        """Return the place of ``size`` on the scale."""
        if self._predicted is None:
            return size
        if size not in self._values:
            self._values[size] = float(self._predicted(size))
        return self._values[size]

    def target(self, evidence: Evidence) -> int | None:
        """Return the index of the last legal size that should fit, -1 for none; None where nothing tells."""
        self._drop_unless_rising(evidence)
        points = [(self.value(size), peak) for size, peak in evidence.points()]
        limit = crossing(points, evidence.capacity, proportional=self._predicted is not None)
        return None if limit is None else bisect_right(evidence.sizes, limit, key=self.value) - 1

    def _drop_unless_rising(self, evidence: Evidence) -> None:
        """A prediction that is no number, or does not grow with the batch, is no scale."""
        if self._predicted is None:
            return
        sizes = sorted({evidence.sizes[0], evidence.sizes[-1], *(size for size, _ in evidence.points())})
        values = [self.value(size) for size in sizes]
        rising = all(one < other for one, other in itertools.pairwise(values))
        if not (rising and values[0] > 0 and math.isfinite(values[-1])):
            self._predicted = None
