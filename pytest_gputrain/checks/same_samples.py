"""Samples that two ranks share, beyond what chance explains.

Where each rank draws at random from the same set, a sample comes up twice on one rank about as often as
once on each of two. Where each walks the whole set on its own (a shuffled DataLoader without a
DistributedSampler), no rank sees a sample twice, and yet both see the same ones.
"""

from __future__ import annotations

import math
from collections import Counter

from pytest_gputrain.checks.batch_reading import Leaf, Reading
from pytest_gputrain.checks.result import CheckFailed, Figures

# Of a false alarm: 17 shared samples and none seen twice are the fewest that fail.
CHANCE = 1e-5
# And they are so many times more than those seen twice; over fewer steps a batch drawn without replacement
# still hides what is seen twice.
MANY_TIMES, MIN_STEPS = 4, 4
# Ranks that take turns with the parts of a data set share samples too, but not before the first turn ends.
EARLY = 2

Samples = list[tuple[str, ...]]


def data_leaves(steps: list[Reading]) -> set[str]:
    """Leaves that hold data: one row a sample, samples that differ, other content at the same shape.

    Not what is the same for all samples of a batch (positions, a mask of ones, a task), nor what follows
    from the batch's shape.
    """
    return {path for path in set[str]().union(*steps) if _is_data([s[path] for s in steps if path in s])}


def _is_data(leaves: list[Leaf]) -> bool:
    if any(leaf.rows is None for leaf in leaves):
        return False
    shapes = {leaf.shape for leaf in leaves}
    contents = {(leaf.shape, leaf.digest) for leaf in leaves}
    changes = len(contents) > len(shapes) or len(shapes) == len(leaves)
    single = all(len(leaf.rows or ()) == 1 for leaf in leaves)
    return changes and (single or any(len(set(leaf.rows or ())) > 1 for leaf in leaves))


def samples(steps: list[Reading], leaves: set[str]) -> Samples:
    """By step, the samples: each the rows of all these leaves together."""
    drawn = []
    for step in steps:
        columns = [leaf.rows for path, leaf in sorted(step.items()) if path in leaves and leaf.rows]
        drawn.append(tuple("".join(row) for row in zip(*columns, strict=True)))
    return drawn


def judge_samples(
    one: Samples, other: Samples, ranks: str, world_size: int, whole: bool, figures: Figures
) -> None:
    """Raises CheckFailed when two ranks share samples that neither of them sees twice.

    one, other: the samples by step of the two; whole: these are their streams to the end.
    """
    for length in sorted({_before_the_second_epoch(one, other), len(one)}):
        mine, theirs = one[:length], other[:length]
        if length < MIN_STEPS or not (found := _found(mine, theirs, world_size)):
            continue
        shared, seen = found
        where = f"{shared} of {seen} samples in {length} steps{_within_a_step(mine, theirs)}"
        if whole and length == len(one) and shared == seen:
            what = f"every rank walks the whole data set: {ranks} share {where}"
        else:
            what = f"{ranks} train on the same samples: they share {where}"
        raise CheckFailed(f"{what}\n{_ADVICE}", {**figures, "shared": shared, "seen": seen})


def _found(one: Samples, other: Samples, world_size: int) -> tuple[int, int] | None:
    """How many samples the two share of how many they see, if that is no chance."""
    counts = [Counter(row for step in steps for row in step) for steps in (one, other)]
    shared = len(counts[0].keys() & counts[1].keys())
    twice = sum(number > 1 for count in counts for number in count.values())
    if not shared or shared < MANY_TIMES * twice or _chance(shared, twice) > CHANCE:
        return None
    turn = math.ceil(len(one) / world_size)
    if len(_distinct(one[:turn]) & _distinct(other[:turn])) < EARLY:
        return None
    return shared, max(len(count) for count in counts)


def _before_the_second_epoch(one: Samples, other: Samples) -> int:
    """The steps before either rank sees a sample again."""
    seen: tuple[set[str], set[str]] = (set(), set())
    for step, drawn in enumerate(zip(one, other, strict=True)):
        for known, rows in zip(seen, drawn, strict=True):
            if len(set(rows) - known) < len(rows):
                return step
            known.update(rows)
    return len(one)


_ADVICE = (
    "  likely: DataLoader(shuffle=True) without a DistributedSampler, or parts that overlap; give each rank "
    "a part of its own (DistributedSampler, dataset[rank::world_size])"
)


def _chance(shared: int, twice: int) -> float:
    """That, of so many coincidences, so many or more fall between the two ranks, if either is as likely."""
    total = shared + twice
    if total > 1000:  # normal approximation; far beyond what matters here
        return 0.5 * math.erfc((shared - total / 2) / math.sqrt(total / 2))
    ways = sum(math.comb(total, number) for number in range(shared, total + 1))
    return float(ways / 2**total)


def _distinct(steps: Samples) -> set[str]:
    return {row for step in steps for row in step}


def _within_a_step(one: Samples, other: Samples) -> str:
    """ ", 2 of 4 in step 1" where there is such a step."""
    together = [len(set(a) & set(b)) for a, b in zip(one, other, strict=True)]
    step = together.index(max(together))
    return f", {together[step]} of {len(one[step])} in step {step} alone" if together[step] > 1 else ""
