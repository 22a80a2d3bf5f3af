"""Does tensor-parallel training go the way that a single process's goes, over several epochs?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled, refuse_simulated

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_training import TrainingRecord


@check("tp_training", subject="tensor parallel")
def check_tp_training(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when losses depart from the single process's, or do not fall, or replicated parameters drift."""
    from pytest_gputrain.tensor_parallel.golden_training import compare_training

    refuse_simulated(ctx, "a step may be anything, optimizers and clipping included")
    record: TrainingRecord = compared(compare_training, case, ctx, doing="training")
    figures = figures_of(record)
    if record.problem:
        fail(ctx, record.problem, figures)
    return labelled(ctx, figures)


def figures_of(record: TrainingRecord) -> Figures:
    """First and last epoch's mean loss on rank 0, and the largest departure from the single process's."""
    losses = record.parallel[0]
    return {
        "epochs": record.epochs,
        "steps": len(record.golden) - 1,
        "loss of the first epoch": record.epoch(losses, 0),
        "loss of the last epoch": record.epoch(losses, record.epochs - 1),
        "largest relative departure": record.worst,
        "notes": list(record.notes),
    }
