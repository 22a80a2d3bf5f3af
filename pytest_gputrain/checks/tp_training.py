"""Does tensor-parallel training go the way that a single process's goes, over several epochs?

And do its weights survive a checkpoint: saved by ranks, loaded by one process, and the other way round.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled, refuse_simulated
from pytest_gputrain.report.metrics import once
from pytest_gputrain.report.series import series

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.golden_training import TrainingRecord
    from pytest_gputrain.tensor_parallel.records_training import CheckpointRecord


@check("tp_training", subject="tensor parallel")
def check_tp_training(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when losses depart from the single process's or do not fall, replicated or tied parameters drift,
    or weights are others after saving and loading."""
    refuse_simulated(ctx, "a step may be anything, optimizers and clipping included")
    record, saved = compared(_trained, case, ctx, doing="training")
    figures = figures_of(record, saved)
    if problem := record.problem or (saved and saved.problem):
        fail(ctx, problem, figures)
    return labelled(ctx, figures)


def _trained(case: TrainingCase, mesh: Any) -> tuple[TrainingRecord, CheckpointRecord | None]:
    """In each rank; no checkpoint is made of what trains wrong."""
    from pytest_gputrain.tensor_parallel.golden_checkpoint import compare_checkpoint
    from pytest_gputrain.tensor_parallel.golden_training import compare_training

    record = compare_training(case, mesh)
    if record.problem is None:
        return record, compare_checkpoint(case, mesh)
    return replace(record, problem=_with_gradients(record, case, mesh)), None


def _with_gradients(record: TrainingRecord, case: TrainingCase, mesh: Any) -> str:
    """The problem, and what is wrong with gradients of as many samples: tp_backward may look at fewer."""
    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward
    from pytest_gputrain.tensor_parallel.golden_training import ROWS

    problem = record.problem or ""
    if not record.departs:
        return problem
    wrong = compare_backward(case, mesh, batch_size=ROWS).problem
    first = (wrong or problem).splitlines()[0]
    return problem if first in problem else f"{problem}\n  in a batch of {ROWS}: {first}"


def figures_of(record: TrainingRecord, saved: CheckpointRecord | None) -> Figures:
    """First and last epoch's mean loss on rank 0, the largest departure from the single process's, and how
    many tensors went through a checkpoint both ways."""
    losses = record.parallel[0]
    return {
        "epochs": record.epochs,
        "steps": len(record.golden) - 1,
        "loss of the first epoch": record.epoch(losses, 0),
        "loss of the last epoch": record.epoch(losses, record.epochs - 1),
        "largest relative departure": record.worst,
        "tensors saved and loaded": saved.to_ranks if saved else 0,
        "metrics": {"final_loss": once(record.epoch(losses, record.epochs - 1), unit="", better="lower")},
        "series": [
            series("loss", "one process", record.golden),
            *(series("loss", f"rank {rank}", losses) for rank, losses in enumerate(record.parallel)),
        ],
        "notes": [*record.notes, *([f"no checkpoint: {saved.skipped}"] if saved and saved.skipped else [])],
    }
