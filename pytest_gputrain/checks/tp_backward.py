"""Are the gradients of the tensor-parallel model those of a single process?

The one comparison that sees a missing or doubled reduction in backward, a norm's partial gradient under
sequence parallel, and weights that are no longer tied: outputs and losses are right in all of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled
from pytest_gputrain.report.series import by_name

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.records_backward import BackwardRecord


@check("tp_backward", subject="tensor parallel")
def check_tp_backward(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when the loss, or the gradient of any parameter on any rank, is not the single process's."""
    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward

    record: BackwardRecord = compared(compare_backward, case, ctx, doing="comparing gradients")
    figures = figures_of(record)
    if record.problem:
        fail(ctx, record.problem, figures)
    return labelled(ctx, figures)


def figures_of(record: BackwardRecord) -> Figures:
    """The worst relative error, whose it is, and the worst of each layer in the order of the model."""
    by_layer: dict[str, float] = {}
    for one in reversed(record.gradients):  # they come in the order of backward
        if not one.negligible:
            by_layer[one.layer] = max(by_layer.get(one.layer, 0.0), one.relative)
    worst = max((one for one in record.gradients if not one.negligible), key=lambda one: one.relative)
    return {
        "gradients": len(record.gradients),
        "largest relative error": worst.relative,
        "of": worst.name,
        "tolerance": worst.tolerance,
        "collectives": str(record.communication),
        "error by layer": by_layer,
        "series": [
            by_name(
                "tp_gradient_error",
                "worst of each layer",
                by_layer,
                limit=worst.tolerance,
                limit_label="tolerance",
            )
        ],
        "notes": [*record.notes, *(f"{name}: {why}" for name, why in record.not_compared)],
    }
