"""Which batch size to run next: by a curve through the measured peaks, or by doubling and bisecting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from pytest_gputrain.batch.evidence import Evidence
from pytest_gputrain.batch.extrapolate import Scale
from pytest_gputrain.batch.ladder import rung

# Peaks that do not rise tell nothing of where memory ends: then the batch grows by this factor. On the curves
# of benchmarks/_curves.py 8 takes fewer probes than 4 and runs out of memory less often than 16.
GROWTH = 8
# After so many probes that together leave more than half of the bracket, it is halved.
PATIENCE = 2
# A target beyond this multiple of what was run is no more than a direction: to miss it is no surprise.
CLOSE = 2
# A bracket whose ends differ by more than this is halved by ratio: its answer may be of either order.
FAR = 8


class Strategy(Protocol):
    """Chooses the next rung to run."""

    def choose(self, evidence: Evidence) -> int:
        """Return an index into ``evidence.sizes`` strictly inside the bracket, which has one inside."""
        ...


class Exponential:
    """The classic: 1, 2, 4, … until memory runs out, then bisecting: 48, 56, 52."""

    def choose(self, evidence: Evidence) -> int:
        """Return the rung at twice the size that fits, or in the middle."""
        low, high = evidence.bracket()
        sizes = evidence.sizes
        if high < len(sizes):
            smaller = sizes[low] if low >= 0 else 0
            return _between(low, high, rung(sizes, (smaller + sizes[high]) // 2))
        return 0 if low < 0 else _between(low, high, rung(sizes, 2 * sizes[low]))


class Model:
    """Jumps to where the curve through the measured peaks reaches capacity; bisects where that gets nowhere.

    ``predicted`` gives the peak of a size as somebody else's model sees it. It replaces the batch size as the
    scale on which peaks are a line, so a prediction that is wrong by a factor or an offset still helps.
    """

    def __init__(self, predicted: Callable[[int], float] | None = None) -> None:
        self._scale = Scale(predicted)
        self._widths: list[int] = []  # of the bracket, once it is closed
        self._was_close = False  # whether the last target above all that ran was near it
        self._slack = 0  # rungs by which the model was wrong of late
        self._expected: tuple[int, bool] | None = None  # the rung chosen last, and whether it should fit

    def choose(self, evidence: Evidence) -> int:
        """Return the last rung that should fit, or the next after it, or one in the middle."""
        self._learn(evidence)
        low, high = evidence.bracket()
        target = self._scale.target(evidence)
        if high < len(evidence.sizes):
            return _between(low, high, self._inside(evidence, low, high, target))
        if low < 0:
            return _between(low, high, target or 0)
        return _between(low, high, self._above(evidence, low, target))

    def _learn(self, evidence: Evidence) -> None:
        """What the model did not foresee widens its targets, so that steps are not climbed rung by rung."""
        if self._expected is not None:
            rung, fits = self._expected
            foreseen = evidence.fits(evidence.sizes[rung]) == fits
            self._slack = self._slack // 2 if foreseen else 2 * self._slack + 1
            self._expected = None

    def _inside(self, evidence: Evidence, low: int, high: int, target: int | None) -> int:
        """A rung of a closed bracket."""
        self._widths.append(high - low)
        if len(self._widths) > PATIENCE and 2 * self._widths[-1] > self._widths[-1 - PATIENCE]:
            self._widths.clear()
            target = None
        if target is None or low < 0:
            return _middle(evidence, low, high)
        return self._aimed(low, high, max(target, low))

    def _aimed(self, low: int, high: int, target: int) -> int:
        """The last rung that should fit or the next: both will be run, first the one that cuts off more."""
        below, above = target - self._slack, target + 1 + self._slack
        if above < high and (below <= low or high - above > below - low):
            self._expected = (above, False)
            return above
        if low < below < high:
            self._expected = (below, True)
            return below
        return (low + high) // 2

    def _above(self, evidence: Evidence, low: int, target: int | None) -> int:
        """A rung above all that ran: the last that should fit; from near it the one after, not to creep."""
        sizes = evidence.sizes
        if target is None:
            return rung(sizes, self._unaided(evidence, sizes[low]))
        close = sizes[target] < CLOSE * sizes[low]
        if target > low and not (close and self._was_close):
            self._was_close = close
            return target
        above = _between(low, len(sizes), max(target, low) + 1 + self._slack)
        self._expected = (above, False)
        return above

    def _unaided(self, evidence: Evidence, size: int) -> float:
        """The size to go to without a slope: as far as is safe with one peak, else by a factor."""
        points = evidence.points()
        if len(points) == 1 and points[0][1] > 0 and math.isfinite(evidence.capacity):
            # n times the batch needs at most n times the memory, so this fits where memory is affine.
            return points[0][0] * evidence.capacity / points[0][1]
        return size * GROWTH


def _between(low: int, high: int, wanted: int) -> int:
    return min(max(wanted, low + 1), high - 1)


def _middle(evidence: Evidence, low: int, high: int) -> int:
    """The middle of the bracket; by ratio where its ends are of different orders."""
    smaller = evidence.sizes[low] if low >= 0 else 0
    larger = evidence.sizes[high]
    far = 0 < smaller * FAR < larger
    return rung(evidence.sizes, math.sqrt(smaller * larger) if far else (smaller + larger) / 2)
