"""Does every rank see data of its own?

Draws from the case's own stream on every rank and compares: whole batches, single leaves, and samples over
the stretch of the stream that there is time for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_reading import Reading, read
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.checks.same_samples import data_leaves, judge_samples, samples

FIRST_STEPS = 6
# Beyond these the stream is walked for the sake of samples that two ranks share.
MAX_WALKED, WALKING_SECONDS = 2000, 1.5
# Twice: with a handful of possible batches, two ranks may draw the same one once.
SAME_STEPS = 2
# Over all steps. Fewer may well be meant to be the same everywhere (a step, a bucket, a noise level).
LEAF_ELEMENTS = 16
# How probable it may be that a leaf of another rank is the same in every step by chance (labels, mostly 0).
CHANCE = 1e-4


@dataclass(frozen=True)
class Walk:
    """What one rank drew; ended: to the end of its stream."""

    steps: list[Reading]
    ended: bool


@check("ddp_data_differs", subject="data parallel")
def check_ddp_data_differs(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when two ranks train on the same data."""
    walks: list[Walk] = on_ranks(
        _walk, case, ctx, world_size=ctx.world_size, doing=f"drawing batches on {ctx.world_size} ranks"
    )
    length = min(len(walk.steps) for walk in walks)
    if length == 0:
        raise CheckFailed("batches() gave no batch on any rank; it has to give the data of one epoch or more")
    steps = [walk.steps[:length] for walk in walks]
    data = set[str]().union(*(data_leaves(own) for own in steps))
    whole = all(walk.ended and len(walk.steps) == length for walk in walks)
    figures: Figures = {"ranks": ctx.world_size, "steps": length}
    for one, other in itertools.combinations(range(ctx.world_size), 2):
        ranks = f"ranks {one} and {other}"
        _judge_batches(steps[one], steps[other], ranks, figures)
        _judge_leaves(steps[one], steps[other], data, ranks, figures)
        drawn = [samples(own, data) for own in (steps[one], steps[other])]
        judge_samples(drawn[0], drawn[1], ranks, ctx.world_size, whole, figures)
    return figures


def _walk(case: TrainingCase, ctx: CheckContext) -> Walk:
    """In each rank."""
    from pytest_gputrain.checks.peers import Peers
    from pytest_gputrain.checks.rounds import Rounds
    from pytest_gputrain.checks.session import seed_everything, seed_for, stream

    peers = Peers()
    # A stream that draws from the global generator is healthy: ranks are seeded apart, once.
    seed_everything(seed_for(ctx, 0, peers.rank))
    data = iter(stream(case, ctx))
    steps = [read(batch) for batch in itertools.islice(data, FIRST_STEPS)]
    ended = len(steps) < FIRST_STEPS
    if case.has_own_batches:
        rest = Rounds(data, peers, limit=MAX_WALKED, seconds=WALKING_SECONDS, ended=ended)
        steps += [read(batch) for batch in rest]
        ended = rest.ended
    return Walk(steps, ended)


def _judge_batches(one: list[Reading], other: list[Reading], ranks: str, figures: Figures) -> None:
    """Raises CheckFailed when whole batches are the same, in whatever order their samples are."""
    varying = _changing(one) | _changing(other) or set(one[0]) | set(other[0])
    mine, theirs = [[_batch_key(step, varying) for step in steps] for steps in (one, other)]
    same = [step for step, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a == b]
    repeats = len(set(mine)) < len(mine) or len(set(theirs)) < len(theirs)
    if len(same) >= (len(mine) if repeats else min(SAME_STEPS, len(mine))):
        listed = ", ".join(map(str, same[:6])) + (", ..." if len(same) > 6 else "")
        where = "every step" if len(same) == len(mine) else f"steps {listed} of {len(mine)}"
        raise CheckFailed(f"{ranks} train on the same batch in {where}\n{_ADVICE}", {**figures, "same": same})
    shift = 0 if repeats else _shift(mine[:FIRST_STEPS], theirs[:FIRST_STEPS])
    if shift:
        apart = f"{abs(shift)} step{'s' if abs(shift) > 1 else ''} apart"
        raise CheckFailed(
            f"{ranks} train on the same batches, {apart}\n{_ADVICE_SHIFT}", {**figures, "shift": shift}
        )


def _judge_leaves(
    one: list[Reading], other: list[Reading], data: set[str], ranks: str, figures: Figures
) -> None:
    """Raises CheckFailed when some of the data are the same in every step, and only the rest differs."""
    shared = sorted(leaf for leaf in data if _same_in_every_step(one, other, leaf))
    if shared and len(one) >= 3:
        raise CheckFailed(
            f"{ranks} train on the same data in {', '.join(shared)} of the batch in every step; only the "
            f"rest differs\n{_ADVICE}",
            {**figures, "leaves": shared},
        )


_ADVICE = (
    "  likely: every rank reads the data from the start; give each its own part (DistributedSampler, "
    "dataset[rank::world_size]) or seed by rank"
)
_ADVICE_SHIFT = (
    "  likely: a seed or offset like `step + rank`, which the next step of the rank before has too; "
    "use `step * world_size + rank`"
)


def _changing(steps: list[Reading]) -> set[str]:
    """Leaves that change from step to step; a mask or positions that never do are not data."""
    return {path for path in set[str]().union(*steps) if len({_digest(step, path) for step in steps}) > 1}


def _digest(step: Reading, path: str) -> str | None:
    return step[path].digest if path in step else None


def _batch_key(step: Reading, leaves: set[str]) -> str:
    """The same for the same samples in another order."""
    rows = samples([step], leaves)[0]
    rest = {path: leaf.digest for path, leaf in sorted(step.items()) if path in leaves and leaf.rows is None}
    return repr((sorted(rows), rest))


def _same_in_every_step(one: list[Reading], other: list[Reading], path: str) -> bool:
    if any(_digest(a, path) != _digest(b, path) for a, b in zip(one, other, strict=True)):
        return False
    leaves = [step[path] for step in one if path in step]
    rows = [row for leaf in leaves for row in leaf.rows or ()]
    if sum(leaf.elements for leaf in leaves) < LEAF_ELEMENTS:
        return False
    counts = Counter(rows)
    alike = sum((count / len(rows)) ** 2 for count in counts.values())
    return len(counts) == len(rows) or alike ** len(rows) < CHANCE


def _shift(one: list[str], other: list[str]) -> int:
    """By how many steps one rank's batches are the other's, over three or more; 0 if they are not."""
    for shift in range(1, len(one) - 2):
        if one[shift:] == other[:-shift]:
            return shift
        if other[shift:] == one[:-shift]:
            return -shift
    return 0
