"""Does the loop get through on several ranks?

Runs the case's own loop: model, wrap, optimizer, then its step over its data. Whether the ranks compute the
right thing is for ``ddp_parity`` to say.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import mark_progress, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures

# An unused parameter shows in the second step, a changed static graph in the one where it changes.
MAX_STEPS = 6
# Beyond the steps taken, a stream is only counted, to see whether all ranks have as many batches.
MAX_COUNTED, COUNTING_SECONDS = 5000, 2.0
_END = object()


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
    wrapped = wrapped_by(case, model)
    optimizer = build_optimizer(case, model, wrapped)
    seed_everything(seed_for(ctx, 0, peers.rank))
    progress, data = _Progress(), iter(stream(case, ctx))
    while progress.steps < MAX_STEPS:
        batch = next(data, _END)
        progress.ended = batch is _END
        progress.batches += not progress.ended
        # Said here, by how many batches each has, instead of by the hang that would follow.
        if case.has_own_batches and peers.any_rank(progress.ended):
            break
        mark_progress(progress.steps)
        value = loss_value(case.step(wrapped, optimizer, [batch]))
        if value is not None and not math.isfinite(value) and progress.bad_step is None:
            progress.bad_step, progress.loss = progress.steps, value
        progress.steps += 1
    if case.has_own_batches:
        rest = Rounds(data, peers, limit=MAX_COUNTED, seconds=COUNTING_SECONDS, ended=progress.ended)
        progress.batches += sum(1 for _ in rest)
        progress.ended = rest.ended
    return progress
