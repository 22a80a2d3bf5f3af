"""A budget of memory for which the largest batch size is known, chosen from the case itself.

Sizes are doubled until what they take grows; the budget then lies half-way between two neighbouring sizes, so
that a finder that counts a little differently still has to give the same answer. The smaller of them is no
power of two where that can be had: 5, mostly. What each size takes is measured, nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.batch_growth import NO_GROWTH, Growth, watch
from pytest_gputrain.checks.batch_runs import Ran, draw, largest_divisor, num_bytes, quick_collection, run
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckSkipped
from pytest_gputrain.checks.session import build_alone
from pytest_gputrain.trace.optimizers import optimizers_in

LARGEST = 128  # find_batch's own bound
# A maximum of 5 needs sizes up to 8, can be missed in many ways, and costs little.
ENOUGH = 8
# A model that is slow gets a smaller answer, and one that does not grow is given up.
SLOW_SECONDS, GIVE_UP_SECONDS = 15.0, 60.0
# What a sample more has to take: that a scalar or the last batch is counted differently must not move the
# answer.
GRAIN = {"cpu": 32, "cuda": 2**20}
BATCHES = 2


@dataclass(frozen=True)
class Scene:
    """What a finder is asked, and what it has to answer.

    budget: bytes. answer: the largest size that fits, from ``minimum`` to ``maximum``; takes, next_takes:
    bytes at it and at the size after it, None where ``answer`` is ``maximum``. global_batch: a number that
    ``answer`` does not divide, and global_answer; 0 where there is none. sample: bytes of a batch of one,
    which may lie around once more or less often than here. growth: of memory from step to step, with which no
    size is the largest. evaluates: whether ``loss`` can be computed in evaluation mode.
    small_takes: bytes at twice ``minimum``, by which nights are compared: ``answer`` depends on the case.
    peaks: bytes by each size that was measured, for the report's plot.
    """

    budget: int
    answer: int
    minimum: int
    maximum: int
    takes: int
    next_takes: int | None = None
    global_batch: int = 0
    global_answer: int = 0
    sample: int = 0
    growth: Growth = NO_GROWTH
    evaluates: bool = True
    small_takes: int | None = None
    peaks: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


class Ladder:
    """What each size takes, measured when first asked for and once."""

    def __init__(self, measure: Callable[[int], Ran], grain: int) -> None:
        self._measure, self._grain = measure, grain
        self._peaks: dict[int, int] = {}
        self.errors: dict[int, Exception] = {}
        self._started = time.monotonic()

    def peak(self, size: int) -> int | None:
        """Bytes; None where the case raises at this size, for another reason than memory."""
        if size not in self._peaks and size not in self.errors:
            try:
                self._peaks[size] = self._measure(size).peak
            except Exception as error:
                self.errors[size] = error
        return self._peaks.get(size)

    def grows(self, low: int, high: int) -> bool:
        one, other = self.peak(low), self.peak(high)
        return one is not None and other is not None and other >= one + self._grain * (high - low)

    @property
    def largest(self) -> int:
        return max(self._peaks)

    @property
    def measured(self) -> tuple[tuple[int, int], ...]:
        """Sizes and their bytes, the smallest first."""
        return tuple(sorted(self._peaks.items()))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started


def find_scene(case: TrainingCase, ctx: CheckContext) -> Scene:
    """In a rank. Raises CheckSkipped where there is nothing to find, else what the case raises."""
    _comes_to_an_end(case, ctx)
    minimum, unable = _smallest(case, ctx)
    small, larger = (num_bytes(draw(case, ctx, size, 0)) for size in (minimum, 2 * minimum))
    if small == larger:
        raise CheckSkipped(
            f"batch() gives as much for a batch size of {2 * minimum} as for {minimum}: the case fixes its "
            "batch "
            "size, so there is nothing to find"
        )
    sample = (larger - small) // minimum
    grain = max(GRAIN[ctx.device], BATCHES * sample)
    with quick_collection():
        ladder = Ladder(lambda size: run(case, ctx, size, evaluating=not unable), grain)
        scene = choose(ladder, minimum)
        scene = replace(scene, small_takes=ladder.peak(2 * minimum), peaks=ladder.measured)
        if unable:
            scene = replace(scene, evaluates=False, notes=(*scene.notes, unable))
        growth = watch(case, ctx, scene.answer, scene.budget, evaluating=scene.evaluates)
        if growth.per_step:
            return replace(scene, growth=growth)
        return replace(_with_global_batch(case, ctx, scene), sample=sample)


def _comes_to_an_end(case: TrainingCase, ctx: CheckContext) -> None:
    """Raises CheckSkipped for an optimizer that remembers its last steps: memory grows over all of them."""
    for inner in optimizers_in(case.optimizer(build_alone(case, ctx))):
        if steps := max((group.get("history_size", 0) for group in inner.param_groups), default=0):
            raise CheckSkipped(
                f"{type(inner).__name__} keeps its last {steps} updates: memory grows over as many, "
                "and a few steps do not say what a batch size takes"
            )


def choose(ladder: Ladder, minimum: int) -> Scene:
    """The scene on a ladder, of which ``minimum`` works. Raises CheckSkipped where none can be made."""
    pair = _growing(ladder, minimum)
    if pair is None:
        if not ladder.measured:
            size, error = next(iter(ladder.errors.items()))
            raise CheckSkipped(
                f"the case works at batch size {minimum} and raises at {size}, so there is nothing to find: "
                f"{describe(error)}"
            )
        top = ladder.largest
        highest = max(ladder.peak(size) or 0 for size in _doubled(minimum) if size <= top)
        note = f"memory does not grow from batch size {minimum} to {top}"
        return Scene(highest + highest // 8, top, minimum, top, highest, notes=(note,))
    answer = _neighbour(ladder, *pair)
    takes, next_takes = ladder.peak(answer), ladder.peak(answer + 1)
    assert takes is not None and next_takes is not None
    return Scene(
        budget=(takes + next_takes) // 2,
        answer=answer,
        minimum=minimum,
        maximum=LARGEST if not ladder.errors else ladder.largest,
        takes=takes,
        next_takes=next_takes,
    )


def _smallest(case: TrainingCase, ctx: CheckContext) -> tuple[int, str]:
    """1, or 2 or 4 where a batch of one cannot be normalised, or pairs are needed; and why evaluation is left
    out.

    A loop with a step of its own may have no use for ``loss`` (several models, say): "" where it can be
    evaluated.
    """
    for size in (1, 2, 4):
        try:
            run(case, ctx, size)
        except Exception as error:
            if _trains(case, ctx, size, at_last=size == 4):
                return size, f"evaluation is left out: loss() in evaluation mode raises {describe(error)}"
        else:
            return size, ""
    raise AssertionError("unreachable")


def _trains(case: TrainingCase, ctx: CheckContext, size: int, *, at_last: bool) -> bool:
    """Without evaluation. Raises what the case raises where there is no larger size to try."""
    try:
        run(case, ctx, size, evaluating=False)
    except Exception:
        if at_last:
            raise
        return False
    return True


def _doubled(minimum: int) -> Iterator[int]:
    return itertools.takewhile(
        lambda size: size <= LARGEST, (minimum << power for power in itertools.count())
    )


def _growing(ladder: Ladder, minimum: int) -> tuple[int, int] | None:
    """A size and its double that takes more, large enough where that can be had."""
    found = None
    for low, high in itertools.pairwise(_doubled(minimum)):
        if ladder.seconds > (SLOW_SECONDS if found else GIVE_UP_SECONDS) or ladder.peak(high) is None:
            break
        if ladder.grows(low, high):
            found = low, high
            if high >= ENOUGH:
                break
    return found


def _neighbour(ladder: Ladder, low: int, high: int) -> int:
    """A size of which the next one takes more, ``low`` taking less than ``high``."""
    first = low + (high - low) // 4
    if ladder.grows(first, first + 1):
        return first
    while high - low > 1:
        middle = (low + high) // 2
        below, above = (
            _known(ladder, middle) - _known(ladder, low),
            _known(ladder, high) - _known(ladder, middle),
        )
        # Into the steeper half: where activations come to matter, beside what every size needs.
        if above * (middle - low) >= below * (high - middle):
            low = middle
        else:
            high = middle
    return low


def _known(ladder: Ladder, size: int) -> int:
    peak = ladder.peak(size)
    if peak is None:
        error = ladder.errors[size]
        raise CheckSkipped(f"the case raises at batch size {size}, between two that work: {describe(error)}")
    return peak


def _with_global_batch(case: TrainingCase, ctx: CheckContext, scene: Scene) -> Scene:
    """The same, and a global batch that the answer does not divide, but a number not far below it does.

    Where the step accumulates there are gradients during forward, which takes more: measured like the rest.
    """
    if scene.answer == 1 or scene.minimum > 1 or scene.next_takes is None:
        return scene
    number = next(
        number
        for number in itertools.count(2 * scene.answer + 1)
        if number % scene.answer and 2 * largest_divisor(number, scene.answer) >= scene.answer
    )
    for size in range(scene.answer, 0, -1):
        if number % size:
            continue
        if run(case, ctx, size, accumulation=2, evaluating=scene.evaluates).peak <= scene.budget:
            return replace(scene, global_batch=number, global_answer=size)
    return scene
