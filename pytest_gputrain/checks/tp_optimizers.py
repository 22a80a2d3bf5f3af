"""Do optimizers move a tensor-parallel model as they move one of a single process?

Adam, SGD, RMSprop and AdamW, one by one and with all tensors at once (foreach, fused), and the case's own
optimizer; then the case's own step, where gradients that are clipped by a rank's own norm show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.records_training import OptimizerRecord


@check("tp_optimizers", subject="tensor parallel")
def check_tp_optimizers(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when an update, or a gradient that the case's step hands to it, is not the single process's."""
    from pytest_gputrain.tensor_parallel.golden_optimizers import compare_optimizers

    record: OptimizerRecord = compared(compare_optimizers, case, ctx, doing="comparing optimizers")
    figures = figures_of(record)
    if record.problem:
        fail(ctx, record.problem, figures)
    return labelled(ctx, figures)


def figures_of(record: OptimizerRecord) -> Figures:
    """The largest relative error of an update, by optimizer too, and what could not be tried."""
    ran = {one.name: one.relative for one in record.results if not one.skipped}
    skipped = [f"{one.name}: {one.skipped}" for one in record.results if one.skipped]
    return {
        "optimizers": len(ran),
        "largest relative error": record.worst,
        "error by optimizer": ran,
        "notes": [*record.notes, *skipped],
    }
