"""Does training stay well over many steps? The case's own loop on several ranks, a record of every step.

With a folder the run is kept, resumed after a kill, and its losses written to compare with later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckOutcome, Figures
from pytest_gputrain.checks.stable_keeping import Keeping, kept
from pytest_gputrain.checks.stable_summary import figures_of
from pytest_gputrain.endurance.ahead import KIND, joined
from pytest_gputrain.endurance.expected import Expected
from pytest_gputrain.endurance.falling import Evidence, judge_falling
from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.judge import growing, pace, remarks
from pytest_gputrain.endurance.losses import departure, mean_losses, read_losses
from pytest_gputrain.endurance.offspring import offspring
from pytest_gputrain.endurance.plan import MOST_STEPS, StabilityOptions, StabilityUsageError
from pytest_gputrain.endurance.progress import shown
from pytest_gputrain.endurance.records import StepRecord, path_of
from pytest_gputrain.endurance.updates import left_out, rate_ended, still, without_effect

if TYPE_CHECKING:
    from pytest_gputrain.checks.stable_told import Ended

# A thousand steps of a large model take hours; a launch that only waits ends long before, by its stall.
HOURS = 6 * 3600.0
# Torch's flight recorder keeps the last 2,000 collectives of a rank: 2 MiB that hundreds of steps fill bit by
# bit. A rank that waits is never further from the others than one step: so many tell as much of a hang.
_RECORDER, _RECORDED = "TORCH_FR_BUFFER_SIZE", "64"
_LEAST_BETWEEN = 20  # steps between checkpoints
# What the ranks' own files raise where they cannot be written, and where that is.
_FULL = re.compile(
    "No space left|quota exceeded|Read-only file system|inline_container|PytorchStreamWriter|iostream"
)
_WRITERS = re.compile(r"endurance/records\.py|checks/stable_state\.py")
_RAISED_THERE = "in DataLoader worker process"  # and so neither died nor waits
_WORKER = (
    "  likely: a data loader's worker process died or waits for ever: num_workers=0 shows its own error; "
    "else look at host memory and /dev/shm"
)


@check("stable_training", subject="stability")
def check_stable_training(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when memory runs out, a loss or weight is not finite, ranks diverge, the loss does not fall, a
    loss is not the saved one, memory, files, threads or step time grow, or a launch of that many steps does
    not come to its end.
    """
    options = ctx.stability or StabilityOptions()
    saved = read_losses(Path(options.losses)) if options.losses else None
    with kept(case, ctx, options) as keeping:
        keeping.begun(options)
        ended = _trained(case, ctx, options, keeping)
        by_rank = keeping.records()
        losses = mean_losses([_losses_of(records) for records in by_rank])
        figures = figures_of(by_rank, losses, ended)
        expected = Expected(case.expected_failures)
        problem, note = _judged(ended, losses, saved, options)
        problem = next(iter(expected.others([problem])), None)
        if problem is None or problem.kind == "loss":
            ranks = dict(enumerate(by_rank))
            moved = any(one.moved for one in ended)
            problem = without_effect(ranks) or (still(ranks) if moved else None) or problem
        elif problem.kind == "divergence":
            problem = _with_what_was_left_out(problem, by_rank)
        lasting, remarked = _lasting(by_rank, ended, expected)
        if problem and lasting and problem.kind == KIND:  # who holds what will not be enough
            problem = replace(problem, message=f"{problem.message}\n{lasting.message}")
        problem = problem or lasting
        figures["notes"] = [*keeping.notes, *figures["notes"], *([note] if note else []), *remarked]
        lost = _written(keeping, losses, problem.message if problem else None, flags=ended[0].flags)
        if problem is not None:
            where = {"step": problem.step, "rank": problem.rank, "kind": problem.kind}
            told = "".join(f"\n  {line}" for line in (*keeping.notes, *lost))
            raise CheckFailed(problem.message + told, {**figures, **where, **problem.figures})
        if lost:
            raise CheckFailed(lost[0], figures)
    return figures


def _written(keeping: Keeping, losses: Mapping[int, float], problem: str | None, **more: Any) -> list[str]:
    """Keep losses and how the run ended; says so where that cannot be, as a verdict has to be found again."""
    try:
        keeping.keep_losses(losses)
        keeping.ended(problem, **more)
    except OSError as error:
        why = error.strerror or str(error)
        return [
            f"how the run ended could not be written to {keeping.folder} ({why}): free space there, and run "
            "it again"
        ]
    return []


def _judged(
    ended: Sequence[Ended],
    losses: Mapping[int, float],
    saved: Mapping[int, float] | None,
    options: StabilityOptions,
) -> tuple[Finding | None, str]:
    """The first thing that is wrong, or a note."""
    found = [one.finding for one in ended if one.finding is not None and one.finding.kind != "victim"]
    if found:
        return joined({r: one.finding for r, one in enumerate(ended)}) or min(found, key=_came_first), ""
    if saved is not None and (parting := _parting(losses, saved, options.loss_tolerance)):
        return parting, ""
    sides = {name: [loss for one in ended for loss in getattr(one, name)] for name in _SIDES}
    own = sides.pop("own_first"), sides.pop("own_last")
    rates = [one.rate for one in ended if one.rate is not None]
    evidence = Evidence(
        **sides,
        own=own,
        steps=ended[0].steps,
        moved=any(one.moved for one in ended),
        rate=max(rates, default=None),
        takes_turns=any(one.takes_turns for one in ended),
    )
    return judge_falling(evidence)


def _came_first(finding: Finding) -> tuple[int, bool]:
    """A loss that is not a number goes by its gradients to the weights of all ranks in that step."""
    return finding.step or 0, not finding.figures.get("loss", False)


def _lasting(
    by_rank: Sequence[Sequence[StepRecord]], ended: Sequence[Ended], expected: Expected
) -> tuple[Finding | None, list[str]]:
    """What grows or gets slower over a run and is not expected, all of it in one finding; and notes."""
    ranks = dict(enumerate(by_rank))
    found = offspring(ranks, {pid: name for one in ended for pid, name in one.workers.items()})
    grown, notes = growing(ranks, {rank: one.held for rank, one in enumerate(ended)})
    found = expected.others([*found, *grown, *pace(ranks)])
    notes += [*expected.notes, *remarks(ranks), *([rated] if (rated := rate_ended(ranks)) else [])]
    if not found:
        return None, notes
    return replace(found[0], message="\n".join(one.message for one in found)), notes


def _with_what_was_left_out(problem: Finding, by_rank: Sequence[Sequence[StepRecord]]) -> Finding:
    """A divergence, with the step that one rank did not take, if that is how it came about."""
    missed = left_out(dict(enumerate(by_rank)))
    if missed is None or problem.step is None or missed[0] > problem.step:
        return problem
    first = problem.message.partition("\n")[0]
    return replace(problem, message=f"{first}\n  {missed[1]}")


_SIDES = ("before", "after", "again", "own_first", "own_last")


def _parting(losses: Mapping[int, float], saved: Mapping[int, float], tolerance: float) -> Finding | None:
    if not losses.keys() & saved.keys():
        message = "no step of this run has a saved loss; give the losses.txt of a run of the same case"
        return Finding("losses", None, None, message)
    if (parting := departure(losses, saved, tolerance)) is None:
        return None
    step, loss, wanted = parting
    allowed = f"{tolerance:g} of it" if tolerance else "exactly that"
    message = (
        f"the loss leaves the saved one in step {step}: {loss!r}, not {wanted!r} (allowed: {allowed}); "
        f"--loss-tolerance allows more, a new losses.txt makes this run the one to compare with"
    )
    return Finding("losses", step, None, message)


def _trained(
    case: TrainingCase, ctx: CheckContext, options: StabilityOptions, keeping: Keeping
) -> list[Ended]:
    from pytest_gputrain.checks.stable_rank import run
    from pytest_gputrain.checks.stable_told import Order

    steps = ctx.iterations or MOST_STEPS
    order = Order(
        folder=str(keeping.folder),
        iterations=ctx.iterations,
        resume_at=keeping.resume_at,
        recorded_until=keeping.recorded_until,
        keeps=keeping.keeps,
        save_every=options.save_every or max(_LEAST_BETWEEN, steps // 10),
        capacity=options.capacity,
    )
    within = replace(ctx, timeout=ctx.timeout or (HOURS if ctx.iterations else None), stability=None)
    try:
        with shown(path_of(keeping.folder, 0), f"{case.name}-{ctx.device}", ctx.iterations, keeping.ranks):
            ended: list[Ended] = on_ranks(
                run,
                case,
                within,
                order,
                world_size=keeping.ranks,
                doing=f"training up to {steps} steps",
                env={} if _RECORDER in os.environ else {_RECORDER: _RECORDED},
            )
    except CheckFailed as failure:
        raise _with_step(failure, keeping) from None
    except BaseException as stop:
        if not isinstance(stop, CheckOutcome | StabilityUsageError):  # Ctrl-C, or a CI runner that ends it
            keeping.interrupted()
        raise
    return ended


def _with_step(failure: CheckFailed, keeping: Keeping) -> CheckFailed:
    """The launch's failure with how far the run was, from what its ranks wrote."""
    done = [records[-1].step if records else 0 for records in keeping.records()]
    first, _, rest = failure.message.partition("\n")
    step = min(done) + 1
    if len(set(done)) > 1:
        told = ", ".join(f"rank {rank}: {last}" for rank, last in enumerate(done))
        where = f"in step {step} (last steps done: {told})"
    else:
        where = f"in step {step}" if min(done) else "before the first step was done"
    lines = [f"{first} ({where})"]
    if missed := left_out(dict(enumerate(keeping.records()))):
        lines[0] += f"; {missed[1]}"
        rest = "\n".join(line for line in rest.splitlines() if not line.startswith("  likely: "))
    is_lost = _FULL.search(first) is not None and _WRITERS.search(failure.message) is not None
    if is_lost:
        other = "give another folder" if keeping.keeps else "set TMPDIR to another folder"
        lines[0] += f"; the run is written to {keeping.folder}: free space there, or {other}"
    if "OutOfMemory" in first or "out of memory" in first.lower():
        lines[0] += "; give it a smaller batch, or find what grows until then"
    if _RAISED_THERE not in first and ("DataLoader" in failure.message or "dataloader.py" in failure.message):
        lines.append(_WORKER)
    if keeping.keeps and (is_lost or "killed" in first):
        lines.append(f"  {keeping.going_on()}")
    else:
        lines += [f"  {line}" for line in _written(keeping, {}, lines[0])]
    return CheckFailed("\n".join([*lines, rest]), {**failure.figures, "step": step, "steps done": done})


def _losses_of(records: Sequence[StepRecord]) -> dict[int, float]:
    return {record.step: record.loss for record in records if record.loss is not None}
