"""Memory curves for the search benchmark: peak in bytes by batch size, of five kinds, drawn from a seed.

Each is drawn from its answer: a maximum from 1 to 2,000, its logarithm uniform, and a share of 2 to 90 % of a
capacity of 24 to 141 GB that does not depend on the batch.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

MIB = 2**20
CAPACITIES = tuple(size * 10**9 for size in (24, 40, 80, 141))
LIMIT = 4096  # the largest batch size that a search may try
LARGEST = 2000  # the largest that a curve lets fit


@dataclass(frozen=True)
class Curve:
    """``peak`` gives bytes; ``exact`` is the largest batch size up to LIMIT that fits."""

    kind: str
    peak: Callable[[int], int]
    capacity: int
    exact: int


@dataclass(frozen=True)
class Drawn:
    """What all kinds are made of: bytes that are there without a batch, and bytes a sample."""

    capacity: int
    fixed: float
    slope: float
    fits: float


def draw(random_: random.Random) -> Drawn:
    """Draw capacity, fixed share and answer, and from these the bytes a sample."""
    capacity = random_.choice(CAPACITIES)
    fits = math.exp(random_.uniform(0, math.log(LARGEST))) + random_.random()
    fixed = random_.uniform(0.02, 0.9) * capacity
    return Drawn(capacity, fixed, (capacity - fixed) / fits, fits)


def affine(random_: random.Random, drawn: Drawn) -> Callable[[int], float]:
    """A line, as tensors alone make it."""
    return lambda batch: drawn.fixed + drawn.slope * batch


def rounded(random_: random.Random, drawn: Drawn) -> Callable[[int], float]:
    """A line in blocks of 2 or 20 MiB, as CUDA's caching allocator reserves them."""
    block = random_.choice((2, 20)) * MIB
    return lambda batch: math.ceil((drawn.fixed + drawn.slope * batch) / block) * block


def stepped(random_: random.Random, drawn: Drawn) -> Callable[[int], float]:
    """A line on which the batch is padded to tiles, and a workspace comes on top from some size on."""
    tile = random_.choice((2, 4, 8, 16))
    workspace = random_.uniform(0, 0.05) * drawn.capacity
    switch = random_.uniform(0, drawn.fits)
    return lambda batch: (
        drawn.fixed + drawn.slope * math.ceil(batch / tile) * tile + (workspace if batch > switch else 0)
    )


def quadratic(random_: random.Random, drawn: Drawn) -> Callable[[int], float]:
    """A parabola: part of the memory, 5 to 100 % at the answer, grows with the square of the batch."""
    share = random_.uniform(0.05, 1.0)
    return lambda batch: drawn.fixed + drawn.slope * batch * (1 - share + share * batch / drawn.fits)


def late_optimizer(random_: random.Random, drawn: Drawn) -> Callable[[int], float]:
    """Flat, then a line: gradients and optimizer state peak in the step, until activations exceed them."""
    in_step = random_.uniform(drawn.fixed, drawn.capacity * 0.98)
    return lambda batch: max(in_step, drawn.fixed + drawn.slope * batch)


KINDS = {
    "affine": affine,
    "rounded": rounded,
    "stepped": stepped,
    "quadratic": quadratic,
    "late optimizer": late_optimizer,
}


def curves(kind: str, count: int, seed: int = 0) -> list[Curve]:
    """Draw ``count`` curves of one kind; the same ones for the same seed."""
    random_ = random.Random(f"{kind} {seed}")
    return [_curve(kind, random_) for _ in range(count)]


def _curve(kind: str, random_: random.Random) -> Curve:
    drawn = draw(random_)
    shape = KINDS[kind](random_, drawn)

    def peak(batch: int) -> int:
        return round(shape(batch))

    exact = bisect_right(range(1, LIMIT + 1), drawn.capacity, key=peak)  # no curve here falls
    # Rounding up may leave no room for even one sample, and nothing to be compared.
    return Curve(kind, peak, drawn.capacity, exact) if exact else _curve(kind, random_)
