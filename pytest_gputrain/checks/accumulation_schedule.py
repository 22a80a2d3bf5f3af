"""Does everything that belongs to an optimizer step happen once a window, and not once a micro-batch?

Three windows as one micro-batch each and as several, in one process: optimizer and scheduler steps, every
number in the optimizer's groups, clipping, zeroing, which micro-batches count, the loss that is returned.
Then the same on all ranks: who is synchronised, how often, and whether the ranks stay equal. A missing
``no_sync`` costs time and is a remark, not a failure.

Does not see logging other than the step's return value, nor schedules that act after the third window.
"""

from __future__ import annotations

import re

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, Figures

# In the ranks' launch, the windows of one micro-batch come first: what fails there is not accumulation's.
WINDOWS = 2
_STEPS = re.compile(r"in step (\d+)|step (\d+) \(rank")


@check("accumulation_schedule", subject="accumulation")
def check_accumulation_schedule(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when something that belongs to the optimizer step happens for every micro-batch."""
    from pytest_gputrain.checks.accumulation_once import judge_once
    from pytest_gputrain.checks.accumulation_ranks import judge_ranks, run_ranks

    figures: Figures = alone(judge_once, case, ctx, doing="stepping over micro-batches in one process")
    notes = list(figures.pop("notes", []))
    doing = f"stepping over micro-batches on {ctx.world_size} ranks"
    try:
        runs = on_ranks(run_ranks, case, ctx, world_size=ctx.world_size, doing=doing)
        figures.update(judge_ranks(runs))
        notes += figures.pop("remarks", [])
    except CheckSkipped as error:
        notes.append(f"not judged on ranks: {error.message}")
    except CheckFailed as error:
        if "verdict" in error.figures and not _accumulated(error.message):
            line = error.message.partition("\n")[0]
            notes.append(f"not judged on ranks, which fail with one micro-batch too: {line}")
        else:
            raise
    return {**figures, "notes": notes}


def _accumulated(message: str) -> bool:
    """Whether all ranks had got through the windows of one micro-batch."""
    reached = [int(one or other) for one, other in _STEPS.findall(message)]
    return bool(reached) and min(reached) >= WINDOWS
