"""Do ranks stay equal, and equal to what single processes compute on their data?

First the case's own loop on all ranks: after every step all parameters are compared, bit by bit, and the
gradients are recorded. Then each rank's steps are replayed by one process, without any data-parallel code,
from the same weights, batches and random state, and the replays are averaged. So BatchNorm, dropout,
clipping and losses over a batch compare exactly: only the averaging is the reference's own. Does not see
what only the choice of data could show; that is ``ddp_data_differs``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckUndecided, Figures

# One step proves nothing, three are the least; a divergence of the optimizer's state takes one more.
STEPS = 5
ACCUMULATING_STEP = 2  # this one has two micro-batches
NUM_MICRO_BATCHES = 2
TWIN_STEPS = 2  # the first has zero gradients behind a zero-initialised projection


@dataclass
class StepFacts:
    """One step on one rank, without its tensors.

    synced: by parameter, the first moment at which its gradient was the same on all ranks; None: at none.
    processed: parameters whose gradient changed between backward and the optimizer.
    """

    micro_batches: bytes = b""
    num_micro_batches: int = 1
    synced: dict[str, str | None] = field(default_factory=dict)
    processed: list[str] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)


@dataclass
class RankRun:
    """What one rank reports. problem: why the ranks are not equal, in the same words on all of them."""

    steps: list[StepFacts] = field(default_factory=list)
    problem: str | None = None
    same_data: bool = False
    notes: list[str] = field(default_factory=list)


@check("ddp_parity", subject="data parallel")
def check_ddp_parity(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when parameters differ across ranks after any step, or gradients differ from the reference."""
    from pytest_gputrain.checks.parity_run import run

    with tempfile.TemporaryDirectory(prefix="gputrain-parity-") as name:
        folder = Path(name)
        doing = f"training on {ctx.world_size} ranks"
        runs: list[RankRun] = on_ranks(run, case, ctx, folder, world_size=ctx.world_size, doing=doing)
        problem = next((rank_run.problem for rank_run in runs if rank_run.problem), None)
        if problem:
            raise CheckFailed(problem, {"ranks": ctx.world_size})
        if all(rank_run.same_data for rank_run in runs):
            raise CheckUndecided(
                "every rank has the same batch, whatever the seed, so a missing synchronisation could not be "
                "seen; let batch() draw from torch's random generator"
            )
        figures = _against_reference(case, ctx, folder, runs)
    figures["notes"] = list(dict.fromkeys([*runs[0].notes, *figures.get("notes", [])]))
    return figures


def _against_reference(case: TrainingCase, ctx: CheckContext, folder: Path, runs: list[RankRun]) -> Figures:
    """The replays are rank 0 of 1 first. Where that fails: what a rank draws may depend on its number."""
    try:
        return _replayed(case, ctx, folder, runs, numbered=False)
    except (CheckFailed, CheckUndecided) as error:
        try:
            figures = _replayed(case, ctx, folder, runs, numbered=True)
        except (CheckFailed, CheckUndecided):
            raise error from None
        note = "agrees with replays that know their rank only: what a rank computes depends on its number"
        figures["notes"] = [*figures["notes"], note]
        return figures


def _replayed(
    case: TrainingCase, ctx: CheckContext, folder: Path, runs: list[RankRun], *, numbered: bool
) -> Figures:
    from pytest_gputrain.checks.parity_reference import judge
    from pytest_gputrain.checks.parity_replay import replay_rank

    packed = [[step.micro_batches for step in rank_run.steps] for rank_run in runs]
    # The twin is rank 0 once more: what differs between the two is noise.
    jobs = [(rank, steps, f"replay-{rank}") for rank, steps in enumerate(packed)]
    jobs.append((0, packed[0][:TWIN_STEPS], "twin"))
    try:
        replays = [
            alone(
                replay_rank,
                case,
                ctx,
                folder,
                *job,
                numbered,
                doing=f"replaying rank {job[0]} in one process",
            )
            for job in jobs
        ]
    except CheckFailed as error:
        raise CheckUndecided(
            f"what {ctx.world_size} ranks do, one process without data parallelism cannot: {error}"
        ) from None
    figures: Figures = alone(judge, case, ctx, folder, runs, replays[:-1], doing="judging the replays")
    return figures
