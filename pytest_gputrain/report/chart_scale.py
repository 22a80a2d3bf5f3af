"""From values to places on paper: ticks that people would choose, scales, thinning of lines. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps ``low``..``high`` to ``start``..``end`` (pixels; ``end`` may be the smaller). low < high."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of ``value``; what is outside is put at the edge."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def spread(values: Sequence[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """Lowest and highest for an axis that holds finite ``values``, never the same.

    ``zero``: the axis begins there, unless values are below. ``log``: whole powers of ten around the values
    above 0.
    """
    if log:
        above = [value for value in values if value > 0]
        if not above:
            return 0.1, 1.0
        low = 10.0 ** math.floor(math.log10(min(above)))
        high = 10.0 ** math.ceil(math.log10(max(above)))
        return low, high if high > low else low * 10
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(high) / 10 or 0.5
        return (low, high + 2 * half) if zero and low == 0 else (low - half, high + half)
    return low, high


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers in low..high, about ``wanted``, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * 1.0000001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def whole_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Ticks of an axis of steps or sizes: whole numbers only."""
    return [tick for tick in ticks(low, high, wanted) if tick == int(tick)] or [math.ceil(low)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten in low..high, every second or third where there are more than ``most``."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return [10.0**exponent for exponent in range(first, last + 1, stride)]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about ``most`` points that look the same: lowest and highest of each stretch are kept, so that
    no spike is lost. Points are by x.
    """
    if len(points) <= most:
        return list(points)
    kept: list[Point] = [points[0]]
    stretches = max(1, most // 2)
    for index in range(stretches):
        part = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        ends = {part.index(min(part, key=_y)), part.index(max(part, key=_y))}
        kept += [part[place] for place in sorted(ends)]
    kept.append(points[-1])
    return list(dict.fromkeys(kept))


def percentile(values: Sequence[float], part: float) -> float:
    """Of values that are there, between neighbours by distance; ``part`` in 0..1."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _y(point: Point) -> float:
    return point[1]
