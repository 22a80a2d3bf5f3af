"""What a search for the batch size knows so far: which sizes fit, which do not, and their peaks."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

from pytest_gputrain.batch.ladder import whole

# Measured peaks of one size differ by about 1 % from run to run; what falls by more than this did fall.
FALLS = 0.03


def checked_peak(peak: object, origin: str) -> float | None:
    """Return a peak that a probe or a cache gave. Raises ``ValueError`` if it is neither a peak nor None."""
    if peak is None:
        return None
    if isinstance(peak, bool) or not isinstance(peak, numbers.Real) or not float(peak) >= 0:
        raise ValueError(
            f"{origin} is {peak!r}; legal is the peak, a number of 0 or more in the unit of capacity, "
            "or None when memory ran out"
        )
    return peak  # type: ignore[return-value]  # an int stays one: bytes are whole


class Evidence:
    """Peaks by batch size under one capacity: ``fresh`` ones were run by this search, ``known`` ones before.

    A peak is in the unit of ``capacity``; None says that memory ran out. What is known is as good as run.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        capacity: float,
        known: Mapping[int, float | None] | None = None,
        show: Callable[[float], str] = "{:.6g}".format,
    ) -> None:
        self.sizes = sizes
        self.show = show
        self.capacity = capacity
        self.fresh: dict[int, float | None] = {}
        self.known = {
            whole("a size in known", size): checked_peak(peak, f"known[{size}]")
            for size, peak in (known or {}).items()
        }

    @property
    def peaks(self) -> dict[int, float | None]:
        """Every peak that counts, by size; fresh ones above known ones."""
        return {**self.known, **self.fresh}

    def sizes_run(self) -> list[int]:
        """Return the sizes whose result counts, in rising order."""
        return sorted(self.peaks)

    def fits(self, size: int) -> bool | None:
        """Whether ``size`` was run within capacity; None when it was not run."""
        if size not in self.peaks:
            return None
        peak = self.peaks[size]
        return peak is not None and math.isfinite(peak) and peak <= self.capacity

    def add(self, size: int, peak: float | None) -> None:
        """Take the result of a fresh probe."""
        self.fresh[size] = peak

    def bracket(self) -> tuple[int, int]:
        """Return (low, high): indices of the largest size that fits and the next that does not.

        Low is -1 when none is known to fit, high is the number of sizes when none above low is known not to.
        """
        rungs = {self.sizes.index(size): self.fits(size) for size in self.sizes_run() if size in self.sizes}
        low = max((rung for rung, fits in rungs.items() if fits), default=-1)
        high = min((rung for rung, fits in rungs.items() if not fits and rung > low), default=len(self.sizes))
        return low, high

    def points(self) -> list[tuple[int, float]]:
        """Return (size, peak) in rising order of size, of legal and other sizes, where a peak is known."""
        found = ((size, self.peaks[size]) for size in self.sizes_run())
        return [(size, peak) for size, peak in found if peak is not None and math.isfinite(peak)]

    def oddities(self) -> list[str]:
        """Return what does not go with memory that grows steadily with the batch, in words."""
        return [*self._fit_above_others(), *self._falls(), *self._jump()]

    def _fit_above_others(self) -> list[str]:
        answer = max((size for size in self.sizes_run() if self.fits(size)), default=0)
        smaller = [str(size) for size in self.sizes_run() if size < answer and not self.fits(size)]
        if not smaller:
            return []
        listed = ", ".join(smaller)
        return [f"{answer} fits although {listed} did not: sizes below {answer} may run out of memory"]

    def _falls(self) -> list[str]:
        return [
            f"the peak falls from {self.show(peak)} at {size} to {self.show(lower)} at {larger}: more may fit"
            for (size, peak), (larger, lower) in itertools.pairwise(self.points())
            if lower < peak * (1 - FALLS)
        ]

    def _jump(self) -> list[str]:
        """The next size does not fit, although growth with the square of the batch would let it."""
        low, high = self.bracket()
        if low < 0 or high == len(self.sizes) or math.isinf(self.capacity):
            return []
        size, larger = self.sizes[low], self.sizes[high]
        peak = self.peaks[size] or 0
        if peak * (larger / size) ** 2 >= self.capacity * (1 - FALLS):
            return []
        took = f"{self.show(peak)} of {self.show(self.capacity)}"
        return [f"{larger} does not fit although {size} takes {took}: more may fit"]
