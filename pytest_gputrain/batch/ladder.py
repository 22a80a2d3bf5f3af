"""The batch sizes that are legal: the rungs a search climbs.

Either every multiple in a range or, where the size has to divide a global batch, its divisors in that range.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Sequence


def whole(name: str, value: object, least: int = 1) -> int:
    """Return ``value`` as an int. Raises ``ValueError`` when it is none, or is below ``least``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # numpy's integers are welcome
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}; legal is a whole number of {least} or more")
    return number


def legal_sizes(
    minimum: int, maximum: int, multiple_of: int = 1, divides: int | None = None
) -> Sequence[int]:
    """Return the legal batch sizes in rising order, at least one.

    Legal are multiples of ``multiple_of`` from ``minimum`` to ``maximum`` that divide ``divides``, if given.
    Raises ``ValueError`` when a bound is no positive whole number, or no size is legal (with the nearest).
    """
    minimum, maximum = whole("minimum", minimum), whole("maximum", maximum)
    multiple_of = whole("multiple_of", multiple_of)
    if minimum > maximum:
        raise ValueError(f"minimum {minimum} is above maximum {maximum}; legal is 1 <= minimum <= maximum")
    if divides is None:
        first = -(-minimum // multiple_of) * multiple_of
        sizes: Sequence[int] = range(first, maximum + 1, multiple_of)
        nearest = [first - multiple_of, first]
    else:
        every = [size for size in divisors(whole("divides", divides)) if size % multiple_of == 0]
        sizes = tuple(size for size in every if minimum <= size <= maximum)
        nearest = [*[size for size in every if size < minimum][-1:], *[s for s in every if s > maximum][:1]]
    if not sizes:
        raise ValueError(_none_is_legal(minimum, maximum, multiple_of, divides, nearest))
    return sizes


def _none_is_legal(
    minimum: int, maximum: int, multiple_of: int, divides: int | None, nearest: list[int]
) -> str:
    wanted = [f"is a multiple of {multiple_of}"] if multiple_of > 1 else []
    wanted += [f"divides {divides}"] if divides is not None else []
    near = " and ".join(str(size) for size in nearest if size > 0)
    beside = f"the nearest: {near}" if near else "no other size does either"
    return f"no batch size from {minimum} to {maximum} {' and '.join(wanted)}; {beside}"


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` in rising order, in time of its square root."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def rung(sizes: Sequence[int], size: float) -> int:
    """Return the index of the largest legal size not above ``size``, -1 when all are above it."""
    return bisect_right(sizes, size) - 1
