"""How much faster is compiled than eager? Arithmetic over blocks of steps that were timed in turn.

Blocks and not steps are compared, because only a whole block is synchronised at both ends: within it the host
may run ahead of the device, as in training. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

# What compiled training has to be worth, what the first compile may take, and how much more memory it may
# need.
RATIO, FIRST_COMPILE_SECONDS, MEMORY = 1.3, 60.0, 1.10
# Compiling, autotuning, allocating and a CPU's clock settle in the first steps: none of them is measured.
WARM_UP = 5
CONFIDENCE = 0.95
MIB = 2**20


@dataclass(frozen=True)
class Block:
    """Steps of one side timed as one, synchronised before and after.

    seconds: of the whole block, without evaluation, saving and compiling. tokens: all positions that the
    steps were given; useful: those of them that count in the loss.
    """

    seconds: float
    steps: int
    tokens: int
    useful: int


@dataclass(frozen=True)
class Ratio:
    """Compiled over eager. each: by pair of blocks. low, high: around the median, sure to about 95 %."""

    median: float
    low: float
    high: float
    each: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, {len(self.each)} pairs of blocks)"


@dataclass(frozen=True)
class Side:
    """One side measured. step_seconds: of each steady step; peak_bytes: None on a CPU."""

    step_seconds: tuple[float, ...]
    tokens_per_second: float
    useful_per_second: float
    peak_bytes: int | None = None

    @property
    def p50(self) -> float:
        return percentile(self.step_seconds, 0.5)

    @property
    def p95(self) -> float:
        return percentile(self.step_seconds, 0.95)


@dataclass(frozen=True)
class SpeedReport:
    """What one case came to. first_compile_seconds: from the first compiled step's begin to its end, less a
    steady step. recompiles: dynamo's reasons, in order. warm_up: steps of each side that were left out.
    flops_per_token: of the products of an eager step, of type flops_dtype; None where none was counted.
    """

    case: str
    device: str
    world_size: int
    eager: Side
    compiled: Side
    ratio: Ratio
    first_compile_seconds: float
    warm_up: int
    tokens_per_step: int
    useful_per_step: int
    graphs: int = 0
    breaks: int = 0
    recompiles: tuple[str, ...] = ()
    flops_per_token: float | None = None
    flops_dtype: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of compiled over eager; None where it was not measured."""
        one, other = self.eager.peak_bytes, self.compiled.peak_bytes
        return other / one if one and other is not None else None


def side_of(blocks: Sequence[Block], step_seconds: Sequence[float], peak_bytes: int | None = None) -> Side:
    """One side from its blocks: tokens a second over all of them."""
    seconds = sum(block.seconds for block in blocks)
    return Side(
        tuple(step_seconds),
        sum(block.tokens for block in blocks) / seconds,
        sum(block.useful for block in blocks) / seconds,
        peak_bytes,
    )


def compare(eager: Sequence[Block], compiled: Sequence[Block]) -> Ratio:
    """Tokens a second of compiled over eager, block by block in the order in which they were timed.

    Raises ValueError where the sides are not comparable: another number of blocks, tokens counted
    differently, or a block that took no time.
    """
    if len(eager) != len(compiled) or not eager:
        raise ValueError(
            f"{len(eager)} blocks of eager against {len(compiled)} of compiled; time them in turn, as many "
            "of "
            "each, at least one"
        )
    each = tuple(_pair(one, other) for one, other in zip(eager, compiled, strict=True))
    low, high = spread(each)
    return Ratio(median(each), low, high, each)


def _pair(eager: Block, compiled: Block) -> float:
    for name, block in (("eager", eager), ("compiled", compiled)):
        if not (block.seconds > 0 and block.steps > 0):
            raise ValueError(
                f"a block of {name} has {block.steps} steps in {block.seconds} s; both must be above 0"
            )
    for what in ("tokens", "useful"):
        one, other = getattr(eager, what) / eager.steps, getattr(compiled, what) / compiled.steps
        if one != other:
            words = "tokens" if what == "tokens" else "useful tokens"
            raise ValueError(
                f"eager counts {one:g} {words} a step, compiled {other:g}: the same batches have the same "
                "tokens; count them from the batch, alike on both sides"
            )
    return (eager.seconds / eager.steps) / (compiled.seconds / compiled.steps)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with 95 %, by the sign test; of few values, their extremes."""
    ordered, number = sorted(values), len(values)
    beyond, left_out = 2 / 2**number, 0  # the chance that the median lies beyond the extremes
    while left_out < (number - 1) // 2:
        beyond += 2 * math.comb(number, left_out + 1) / 2**number
        if beyond > 1 - CONFIDENCE:
            break
        left_out += 1
    return ordered[left_out], ordered[number - 1 - left_out]


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which ``part`` (0 to 1) of them lie, linear in between. Raises ValueError for none."""
    if not values or not 0 <= part <= 1:
        raise ValueError(f"percentile {part!r} of {len(values)} values; give 0 to 1, and at least one value")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def settled(compile_seconds_by_step: Mapping[int, float], warm_up: int = WARM_UP) -> int:
    """The first step that may be measured: after ``warm_up`` steps, and after the last one that compiled."""
    last = max((step for step, seconds in compile_seconds_by_step.items() if seconds > 0), default=-1)
    return max(warm_up, last + 1)


def grade(ratio: Ratio) -> str:
    """In words, by the bar and by whether the spread reaches across it."""
    if ratio.low >= RATIO:
        return f"faster: {ratio.low:.2f} and more"
    if ratio.median >= RATIO:
        return f"faster, though the spread reaches below {RATIO:g}"
    if ratio.high < 1:
        return "slower"
    if ratio.low <= 1:
        return "no gain that can be told from noise"
    return f"faster, but below {RATIO:g}" + (" by less than the spread" if ratio.high >= RATIO else "")


def shortcomings(report: SpeedReport) -> list[str]:
    """What of the three bars is missed, each in a line of its own; empty where all are met."""
    found = []
    if report.ratio.median < RATIO:
        found.append(
            f"compiled trains {report.ratio} times as fast as eager, below {RATIO:g} "
            f"({grade(report.ratio)}): "
            f"{report.compiled.tokens_per_second:.0f} tokens/s against {report.eager.tokens_per_second:.0f}"
        )
    if report.first_compile_seconds > FIRST_COMPILE_SECONDS:
        found.append(
            f"the first compile took {report.first_compile_seconds:.0f} s, more than "
            f"{FIRST_COMPILE_SECONDS:.0f} s"
        )
    memory = report.memory_ratio
    if memory is not None and memory > MEMORY:
        one, other = report.eager.peak_bytes or 0, report.compiled.peak_bytes or 0
        found.append(
            f"compiled needs {memory - 1:.0%} more memory at its peak, more than {MEMORY - 1:.0%}: "
            f"{other / MIB:.0f} MiB against {one / MIB:.0f} MiB"
        )
    return found
