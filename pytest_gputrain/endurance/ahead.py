"""Will memory last to the end of a run? Asked while it runs; says no where that is certain. Pure, no torch.

A cache that fills looks as a leak does until it stops. So nothing is said before three quarters of what was
free at the beginning are gone, and then only where the slope's lower bound already takes more than there is.
Beyond that the machine would end the run, and nobody would know who holds the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pytest_gputrain.endurance.findings import Finding, on
from pytest_gputrain.endurance.growth import Growth, Point, growth
from pytest_gputrain.values import format_size

KIND = "memory_ahead"
EVERY = 10  # steps or more between two points, as long as there are few
_MOST_POINTS = 400  # then every second one goes
_LEFT = 0.25
# Of what was free: less than that, at the run's end, is not worth a question how much there is now.
_WORTH_ASKING = 0.05


def joined(by_rank: Mapping[int, Finding | None]) -> Finding | None:
    """One finding for all ranks whose memory will not last, where several said so at once: that of the rank
    where it ends first, told of all of them. None where anything else was found, or one rank alone says it.
    """
    here = {rank: one for rank, one in by_rank.items() if one is not None and one.kind == KIND}
    others = [one for one in by_rank.values() if one is not None and one.kind not in (KIND, "victim")]
    if len(here) < 2 or others:
        return None
    rank = min(here, key=lambda rank: int(here[rank].figures["full_at"]))
    message = here[rank].message.replace(f"on rank {rank}: ", f"{on([*here], len(by_rank))}: up to ", 1)
    return replace(here[rank], rank=None, message=message)


@dataclass
class Outlook:
    """Of one rank. what: whose memory; last: the run's last step.

    left: bytes that can still be had, by how many the rank has taken since the beginning.
    """

    what: str
    left: Callable[[float], float]
    last: int

    def __post_init__(self) -> None:
        self._free = self.left(0)
        self._points: list[Point] = []
        self._every, self._next = EVERY, 0

    def add(self, step: int, value: float | None, rank: int) -> Finding | None:
        """After a step; None, in a microsecond, where there is nothing to fear."""
        if step < self._next or value is None:  # not every measure is taken in every step
            return None
        self._points.append((step, value))
        self._next = step + self._every
        if len(self._points) > _MOST_POINTS:
            self._points, self._every = self._points[1::2], 2 * self._every
        first, start = self._points[0]
        taken = value - start
        if taken <= 0 or taken * (self.last - first) < _WORTH_ASKING * self._free * (step - first):
            return None
        left = self.left(taken)
        if left > _LEFT * self._free:
            return None
        grown = growth(self._points, least=_WORTH_ASKING * self._free)
        if grown is None or grown.low * (self.last - step) <= left:
            return None
        return self._finding(step, rank, left, grown)

    def _finding(self, step: int, rank: int, left: float, grown: Growth) -> Finding:
        full = step + max(0, math.floor(left / grown.slope))
        each, still = format_size(round(grown.slope)), format_size(max(0, round(left)))
        message = (
            f"{self.what} will not last on rank {rank}: {each} more a step from step {grown.first} on, and "
            f"{still} left after step {step}, so that about step {full} of {self.last} would be the last "
            "one; the run is ended here"
        )
        figures = {"a_step": grown.slope, "between": [grown.low, grown.high], "full_at": full}
        return Finding(KIND, step, rank, message, figures)
