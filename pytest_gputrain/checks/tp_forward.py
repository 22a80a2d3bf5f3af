"""Does the tensor-parallel model compute what a single process computes?

Outputs, shapes, types, NaN and Inf, and the loss, over several input shapes. Right outputs say little about
training: a missing backward reduction leaves them as they are, and ``tp_backward`` is for those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.records import ForwardRecord


@check("tp_forward", subject="tensor parallel")
def check_tp_forward(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when any output or loss on any rank is not the single process's."""
    from pytest_gputrain.tensor_parallel.golden_forward import compare_forward

    record: ForwardRecord = compared(compare_forward, case, ctx, doing="comparing outputs")
    figures = figures_of(record)
    if record.problem:
        fail(ctx, record.problem, figures)
    return labelled(ctx, figures)


def figures_of(record: ForwardRecord) -> Figures:
    """Largest absolute differences of outputs and losses, over all inputs and ranks."""
    return {
        "inputs": [" x ".join(map(str, one.input_shape)) for one in record.inputs],
        "largest output difference": record.worst,
        "largest loss difference": record.worst_loss,
        "notes": list(record.notes),
    }
