"""Are the gradients of two runs of one program the same? Pure: reads what ranks noted (``trace/study.py``).

A gradient is known by its norm and its projections on a few fixed random directions. The mean square of the
differences of these projections is, on average, the square of the norm of the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Gradients = Mapping[str, Sequence[float] | None]

# Recomputation is the same arithmetic on the same numbers. Relative to the gradient; wide, because the
# projections only estimate a difference, and far below what a wrong recomputation does.
TOLERANCE = 1e-4
# A difference that is rounding beside the whole model's gradient: a bias before a norm has only noise.
NEGLIGIBLE = 1e-7
# How far beyond what the same program differs by from run to run.
NOISE_FACTOR = 4.0


@dataclass(frozen=True)
class Difference:
    """The parameter that is furthest off, and by what part of its gradient; 1.0 if it is missing in one."""

    step: int
    name: str
    size: float
    parameters: int


def worst_difference(one: Sequence[Gradients], other: Sequence[Gradients]) -> Difference | None:
    """The worst over all steps that both have; None where every gradient is exactly the same.

    Later steps start from weights that an earlier difference has moved: the first step that differs is told.
    """
    for step, (mine, theirs) in enumerate(zip(one, other, strict=False), start=1):
        total = sum(seen[0] ** 2 for seen in mine.values() if seen is not None) ** 0.5
        sizes = {
            name: distance(mine.get(name), theirs.get(name), NEGLIGIBLE * total)
            for name in dict.fromkeys([*mine, *theirs])
        }
        wrong = {name: size for name, size in sizes.items() if size > 0}
        if wrong:
            name = max(wrong, key=lambda key: wrong[key])
            return Difference(step, name, wrong[name], len(wrong))
    return None


def distance(one: Sequence[float] | None, other: Sequence[float] | None, negligible: float = 0.0) -> float:
    """The norm of the difference over the larger norm, about; 0 where it is negligible."""
    if one is None and other is None:
        return 0.0
    if one is None or other is None:
        return 1.0
    if any(value != value for value in (*one, *other)):  # NaN in both is the same, in one it is not
        return 0.0 if [v != v for v in one] == [v != v for v in other] else 1.0
    squares = [(a - b) ** 2 for a, b in zip(one[1:], other[1:], strict=True)]
    size = max(abs(one[0] - other[0]), (sum(squares) / max(1, len(squares))) ** 0.5)
    return 0.0 if size <= negligible else float(size / max(one[0], other[0]))
