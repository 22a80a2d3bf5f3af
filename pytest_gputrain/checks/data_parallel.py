"""Does the loop get through on several ranks, and does every rank see data of its own?

Runs the case's own loop: model, wrap, optimizer, then its step over its data. Whether the ranks compute the
right thing is for ``ddp_parity`` to say.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import mark_progress, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures

# An unused parameter shows in the second step, a changed static graph in the one where it changes.
MAX_STEPS = 6
# Beyond the steps taken, a stream is only counted, to see whether all ranks have as many batches.
MAX_COUNTED, COUNTING_SECONDS = 5000, 2.0


@check("ddp_completes", subject="data parallel")
def check_ddp_completes(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when the loop hangs, crashes or raises on any rank, or a loss is not a number."""
    figures = _run(case, ctx, False)
    if case.set_checkpointing is not None:
        figures["steps with checkpointing"] = _run(case, ctx, True)["steps"]
    return figures


def _run(case: TrainingCase, ctx: CheckContext, checkpointing: bool) -> Figures:
    how = " with activation checkpointing on" if checkpointing else ""
    doing = f"training on {ctx.world_size} ranks{how}"
    started = time.monotonic()
    ranks: list[_Progress] = on_ranks(
        _train, case, ctx, checkpointing, world_size=ctx.world_size, doing=doing
    )
    for rank, progress in enumerate(ranks):
        if progress.bad_step is not None:
            raise CheckFailed(f"the loss is {progress.loss} in step {progress.bad_step} on rank {rank}{how}")
    _judge_lengths(ranks)
    steps = min(progress.steps for progress in ranks)
    if steps == 0:
        raise CheckFailed("batches() gave no batch on any rank; it has to give the data of one epoch or more")
    return {"ranks": ctx.world_size, "steps": steps, "seconds": round(time.monotonic() - started, 2)}


@dataclass
class _Progress:
    """How far one rank came. batches: how many its stream has, as far as it was counted."""

    steps: int = 0
    loss: float | None = None
    bad_step: int | None = None
    batches: int = 0
    ended: bool = False


def _judge_lengths(ranks: list[_Progress]) -> None:
    """Ranks that stop at different steps hang, if not in the steps taken here then later."""
    shortest = min((rank.batches for rank in ranks if rank.ended), default=None)
    if shortest is None:
        return
    longest = max(rank.batches for rank in ranks)
    if longest > shortest:
        counts = ", ".join(
            f"rank {number}: {rank.batches}{'' if rank.ended else ' or more'}"
            for number, rank in enumerate(ranks)
        )
        raise CheckFailed(
            f"ranks have different numbers of batches ({counts}): the others wait for ever in step "
            f"{shortest}\n"
            "  likely: a dataset that is not divisible by the world size; drop the last batches, or pad as "
            "DistributedSampler does"
        )


def _train(case: TrainingCase, ctx: CheckContext, checkpointing: bool) -> _Progress:
    """In each rank: the loop."""
    from pytest_gputrain.checks.peers import Peers
    from pytest_gputrain.checks.rounds import Rounds
    from pytest_gputrain.checks.session import (
        build_model,
        build_optimizer,
        loss_value,
        seed_everything,
        seed_for,
        stream,
    )

    peers = Peers()
    model = build_model(case, ctx)
    if checkpointing:
        assert callable(case.set_checkpointing)
        case.set_checkpointing(model, slice(None))
    wrapped = case.wrap(model)
    optimizer = build_optimizer(case, model, wrapped)
    seed_everything(seed_for(ctx, 0, peers.rank))
    progress, data = _Progress(), iter(stream(case, ctx))
    for batch in itertools.islice(data, MAX_STEPS):
        mark_progress(progress.steps)
        value = loss_value(case.step(wrapped, optimizer, [batch]))
        if value is not None and (value != value or abs(value) == float("inf")):
            progress.bad_step, progress.loss = (
                progress.steps if progress.bad_step is None else progress.bad_step,
                value,
            )
        progress.steps += 1
    progress.batches, progress.ended = progress.steps, progress.steps < MAX_STEPS
    if case.has_own_batches:
        rest = Rounds(data, peers, limit=MAX_COUNTED, seconds=COUNTING_SECONDS, ended=progress.ended)
        progress.batches += sum(1 for _ in rest)
        progress.ended = rest.ended
    return progress


DATA_STEPS = 6
# Twice: with a handful of possible batches, two ranks may draw the same one once.
SAME_STEPS = 2
# A leaf with fewer elements may well be meant to be the same everywhere (a step, a bucket, a noise level).
DATA_ELEMENTS = 16

Digests = dict[str, str]


@check("ddp_data_differs", subject="data parallel")
def check_ddp_data_differs(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when two ranks train on the same data."""
    ranks: list[list[tuple[Digests, list[str]]]] = on_ranks(
        _draw, case, ctx, world_size=ctx.world_size, doing=f"drawing batches on {ctx.world_size} ranks"
    )
    steps = min(len(batches) for batches in ranks)
    if steps == 0:
        raise CheckFailed("batches() gave no batch on any rank; it has to give the data of one epoch or more")
    digests = [[leaf_digests for leaf_digests, _ in batches] for batches in ranks]
    large = set(ranks[0][0][1])
    figures: Figures = {"ranks": ctx.world_size, "steps": steps}
    for one, other in itertools.combinations(range(ctx.world_size), 2):
        _judge_pair(digests[one][:steps], digests[other][:steps], (one, other), large, figures)
    return figures


def _draw(case: TrainingCase, ctx: CheckContext) -> list[tuple[Digests, list[str]]]:
    """In each rank: the digest of every leaf of its first batches, and which leaves are large."""
    import torch.distributed as dist

    from pytest_gputrain.checks.session import seed_everything, seed_for, stream
    from pytest_gputrain.trace.digest import value_digest

    # A stream that draws from the global generator is healthy: ranks are seeded apart, once.
    seed_everything(seed_for(ctx, 0, dist.get_rank()))
    drawn = []
    for batch in itertools.islice(stream(case, ctx), DATA_STEPS):
        found = list(pytree.leaves(batch))
        large = [path for path, leaf in found if pytree.is_tensor(leaf) and leaf.numel() >= DATA_ELEMENTS]
        drawn.append(({path: value_digest(leaf) for path, leaf in found}, large))
    return drawn


def _judge_pair(
    one: list[Digests], other: list[Digests], pair: tuple[int, int], large: set[str], figures: Figures
) -> None:
    """Raises CheckFailed when these two ranks see the same data."""
    varying = _varying(one) | _varying(other)
    data = varying or set(one[0]) | set(other[0])
    mine, theirs = [_only(step, data) for step in one], [_only(step, data) for step in other]
    same = [step for step, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a == b]
    ranks = f"ranks {pair[0]} and {pair[1]}"
    if len(same) >= min(SAME_STEPS, len(mine)):
        where = (
            "every step" if len(same) == len(mine) else f"steps {', '.join(map(str, same))} of {len(mine)}"
        )
        raise CheckFailed(f"{ranks} train on the same batch in {where}\n{_ADVICE}", {**figures, "same": same})
    shift = _shift(mine, theirs)
    if shift:
        apart = f"{abs(shift)} step{'s' if abs(shift) > 1 else ''} apart"
        raise CheckFailed(
            f"{ranks} train on the same batches, {apart}\n{_ADVICE_SHIFT}",
            {**figures, "shift": shift},
        )
    shared = sorted(
        leaf
        for leaf in varying & large
        if all(a.get(leaf) == b.get(leaf) for a, b in zip(one, other, strict=True))
    )
    if shared and len(mine) >= 3:
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


def _varying(steps: list[Digests]) -> set[str]:
    """Leaves that change from step to step; a mask or positions that never do are not data."""
    leaves = set().union(*steps)
    return {leaf for leaf in leaves if len({step.get(leaf) for step in steps}) > 1}


def _only(step: Digests, leaves: set[str]) -> Digests:
    return {leaf: digest for leaf, digest in step.items() if leaf in leaves}


def _shift(one: list[Digests], other: list[Digests]) -> int:
    """By how many steps one rank's batches are the other's, over three or more; 0 if they are not."""
    texts = [[repr(sorted(step.items())) for step in steps] for steps in (one, other)]
    if any(len(set(steps)) < len(steps) for steps in texts):
        return 0  # a stream that repeats itself anyway
    for shift in range(1, len(one) - 2):
        if texts[0][shift:] == texts[1][:-shift]:
            return shift
        if texts[1][shift:] == texts[0][:-shift]:
            return -shift
    return 0
