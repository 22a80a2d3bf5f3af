"""Does a series of measurements grow without end? Pure, no torch.

A leak raises the floor: of eight windows, the least value of each is above that of the one before, by about
as much each time, up to the end of the run. Memory that goes up and down, that is filled once and then stays,
or that jumps, does not do that. Growth may begin anywhere, so the beginning of the windows is looked for.

Not told from a leak: a cycle that is longer than the run, and a filling that ends in its last tenth or
later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from statistics import median

Point = tuple[int, float]

WINDOWS = 8
# Fewer points in a window have no floor of their own.
LEAST_POINTS = 3 * WINDOWS
# Allocators, caches and optimizer state settle in the first steps; growth that is there from then on may slow
# down. Growth that begins later has to be faster than what was before it.
_FIRST, _SETTLED, _WARM = 5, 0.1, 0.3
_STARTS = 20  # a run's twentieths are tried as beginnings
# Growth that has lost more than half its pace by the second half is a filling that ends.
_KEEPS_PACE = 0.45
# Of the mean rise from a window to the next: noise beside a jump has smaller ones, a jump is a larger one.
_LEAST_RISE, _MOST_RISE = 0.2, 3.0
_FASTER = 2.0
# What was added, in heights of a window: a cycle that falls in with the windows stays within its own.
_HEIGHTS = 1.0
# Of what was added, above all that was there before: a cycle only comes back to where it was.
_NEW = 0.5
# Of a run, without a new maximum at its end: growth that has stopped.
_ENDED = 0.1
_NORMAL_95 = 1.96
_MOST_POINTS = 128  # pairs of points are compared: 8,128 of them


@dataclass(frozen=True)
class Growth:
    """A slope a step, and where it lies with 95 % confidence. first, last: the steps between which it grows.

    total: what was added between the first window's floor and the last one's.
    """

    slope: float
    low: float
    high: float
    total: float
    first: int
    last: int


def growth(points: Sequence[Point], *, least: float, least_slope: float = 0.0) -> Growth | None:
    """The growth of a series of (step, value) that goes on at its end; None where there may be none.

    least: what the floor has to rise by in all to count; least_slope: by step. None too where there are too
    few points: ``has_enough`` tells.
    """
    n = len(points)
    if not has_enough(points) or not _goes_on([value for _, value in points]):
        return None
    begin, earliest = math.ceil(_SETTLED * n), max(_FIRST, n // 32)
    for number in range(round(_SETTLED * _STARTS), _STARTS):
        start = max(begin, n * number // _STARTS)
        if n - start < LEAST_POINTS:
            return None
        grown = _rises(points[start:], least)
        if grown is None or not _is_new(
            points[min(earliest, start - 1) : start], points[start:], is_warm=start <= _WARM * n
        ):
            continue
        slope, low, high = slope_of(points[start:])
        if low > least_slope:
            return Growth(slope, low, high, grown, points[start][0], points[-1][0])
    return None


def _goes_on(values: Sequence[float]) -> bool:
    """Whether the last new maximum is not much older at the end than maxima were in between.

    Counted are those a hundredth of the range above the last: noise on a plateau makes smaller ones.
    """
    begin = math.ceil(_SETTLED * len(values))
    part = (max(values[begin:]) - min(values[begin:])) / 100
    highest, at, gaps = values[begin], begin, [0]
    for place in range(begin, len(values)):
        if values[place] > highest + part:
            gaps.append(place - at)
            highest, at = values[place], place
    # Growth may begin late: the wait for it is no gap between two maxima of it.
    longest = sorted(gaps)[-2] if len(gaps) > 2 else gaps[-1]
    return len(values) - at <= max(1.5 * longest, _ENDED * len(values))


def has_enough(points: Sized) -> bool:
    """Whether ``growth`` can say anything of so many points."""
    return len(points) - math.ceil(_SETTLED * len(points)) >= LEAST_POINTS


def slope_of(points: Sequence[Point]) -> tuple[float, float, float]:
    """Theil and Sen's slope with its 95 % interval: the median over pairs, which outliers do not move.

    The interval is Sen's, from the variance of Kendall's statistic (Sen 1968). Needs two steps or more.
    """
    stride = -(-len(points) // _MOST_POINTS)
    chosen = points[::stride]
    slopes = sorted(
        (y2 - y1) / (x2 - x1)
        for index, (x1, y1) in enumerate(chosen)
        for x2, y2 in chosen[index + 1 :]
        if x2 != x1
    )
    n = len(chosen)
    reach = _NORMAL_95 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(0, math.floor((len(slopes) - reach) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2))
    return median(slopes), slopes[low], slopes[high]


def _rises(points: Sequence[Point], least: float) -> float | None:
    """What the floors rise by, if they do so evenly and up to the end."""
    values = [value for _, value in points]
    floors = _floors(values, WINDOWS)
    total = floors[-1] - floors[0]
    if total < least or total <= 0:
        return None
    half = WINDOWS // 2
    keeps = floors[-1] - floors[half] >= _KEEPS_PACE * (floors[half - 1] - floors[0])
    # A cycle in step with one width of windows is not so with another.
    even = all(_is_even(_floors(values, number)) for number in (WINDOWS, WINDOWS - 1, WINDOWS - 3))
    return total if keeps and even and total >= _HEIGHTS * _height(values) else None


def _height(values: Sequence[float]) -> float:
    """How far values lie apart in one window, as most windows have it."""
    return median(max(those) - min(those) for those in _windows(values, WINDOWS))


def _is_even(floors: Sequence[float]) -> bool:
    rises = [later - earlier for earlier, later in itertools.pairwise(floors)]
    mean = (floors[-1] - floors[0]) / len(rises)
    return mean > 0 and min(rises) >= _LEAST_RISE * mean and max(rises) <= _MOST_RISE * mean


def _is_new(before: Sequence[Point], after: Sequence[Point], *, is_warm: bool) -> bool:
    """Whether growth goes above all that was there before and, after the warm-up, is faster than it."""
    last = _floors([value for _, value in after], WINDOWS)
    total = last[-1] - last[0]
    width = max(1, min(len(after) // WINDOWS, len(before) // 4))
    floors = _floors([value for _, value in before], max(1, len(before) // width))
    earlier = (floors[-1] - floors[0]) / len(before)
    is_faster = total / len(after) >= _FASTER * earlier
    return last[-1] - max(floors) >= _NEW * total and (is_warm or is_faster)


def _floors(values: Sequence[float], windows: int) -> list[float]:
    return [min(those) for those in _windows(values, windows)]


def _windows(values: Sequence[float], windows: int) -> list[Sequence[float]]:
    bounds = [round(len(values) * number / windows) for number in range(windows + 1)]
    return [values[a:b] for a, b in itertools.pairwise(bounds)]
