"""What reaches the optimizer in the case's own step: gradients after clipping, averaging and unscaling.

A step that clips by the norm of each rank's own part, or that forgets to sum a norm's gradient over the
ranks, is seen here, and one that sums it where backward left it partial is found right. The reference takes
the same step as one process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_factor import WAY_OUT, clipped_by
from pytest_gputrain.tensor_parallel.golden_gradients import Gradients, compare_gradients, percent
from pytest_gputrain.tensor_parallel.golden_model import asking, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord
from pytest_gputrain.tensor_parallel.records_training import StepRecord
from pytest_gputrain.trace.names import owners
from pytest_gputrain.trace.optimizers import OptimizerWatch

SUMMED_AGAIN = (
    "likely what ranks have summed is summed again: sum each backward's own part (Tensor.register_hook), or "
    "once behind the last micro-batch"
)
# At the size that they have, and so large that any clipping clips.
SCALES = (1.0, 1e4)


def take(
    case: TrainingCase,
    model: nn.Module,
    batch: Any,
    seed: int,
    scale: float = 1.0,
    *,
    optimizer: Any = None,
    losses: list[Any] | None = None,
    parts: int = 1,
) -> dict[str, Any]:
    """One step of the case; returns clones of the gradients as the (first) optimizer got them.

    optimizer: None is a new one of the case's; losses: what the step returned is added to it; parts: how many
    micro-batches the batch is split into.
    """
    parameters = parameters_of(model)
    seen: dict[str, Any] = {}

    def before(optimizer: Any, held: Any) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None and name not in seen:
                seen[name] = parameter.grad.detach().clone()

    trained = [parameter for parameter in parameters.values() if parameter.requires_grad and scale != 1]
    hooks = [parameter.register_hook(lambda grad: grad * scale) for parameter in trained]
    optimizer = case.optimizer(model) if optimizer is None else optimizer
    try:
        with asking(seed), OptimizerWatch(optimizer, before):
            loss = case.step(model, optimizer, [batch] if parts == 1 else case.split(batch, parts))
    finally:
        for hook in hooks:
            hook.remove()
    if losses is not None:
        losses.append(loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float("nan")))
    return seen


def compare_step(pair: Pair, batch: Any, scale: float, parts: int = 1) -> StepRecord | None:
    """One step of both models from the weights that they have, which it changes; collective.

    None where the step does not run on one process alone, which is noted.
    """
    try:
        with pair.world.alone():
            golden = take(pair.case, pair.reference, batch, pair.seed, scale, parts=parts)
    except Exception as error:
        pair.notes.append(
            f"the case's step does not run without ranks ({type(error).__name__}: {error!s:.60}), so what it "
            "does to gradients could not be compared"
        )
        return None
    with pair.world.acting():
        got = take(pair.case, pair.parallel, batch, pair.seed, scale, parts=parts)
    if not golden:
        pair.notes.append("the case's step never stepped an optimizer, so what it does could not be compared")
        return None
    layers = {name: owner.path for name, owner in owners(pair.reference).items()}
    records = compare_gradients(pair, Gradients.from_named(golden, layers), got)
    return StepRecord(scale, tuple(records), _problem(pair, records, scale, parts))


def _problem(pair: Pair, records: list[GradientRecord], scale: float, parts: int) -> str | None:
    wrong = [record for record in records if record.problem]
    if not wrong:
        return None
    first = wrong[0]
    what = (
        "in the case's step gradients that are large enough to be clipped reach the optimizer wrong"
        if scale > 1
        else "in the case's step the optimizer gets wrong gradients"
    )
    if parts > 1:
        what += f" after {parts} micro-batches, and the right ones after one"
        first = replace(first, cause=first.cause or SUMMED_AGAIN)
    by_rank = ", ".join(f"{percent(one)} on rank {r}" for r, one in enumerate(first.by_rank))
    off = f"{first.name}.grad is off by {by_rank}"
    count = f"{len(wrong)} of {len(records)} gradients are wrong"
    if norm := clipped_by(records):
        return f"{what}: {norm}\n  {count}; {off}"
    if scale > 1:
        return f"{what}: {off}; likely each rank clips by a norm of its own: {WAY_OUT}\n  {count}"
    why = f" ({first.cause})" if first.cause else ""
    return f"{what}: {first.problem}{why}\n  {count}; {off}"
