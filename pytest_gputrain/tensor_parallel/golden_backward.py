"""Every parameter's gradient against the reference's, and where they depart first, going backward.

The one comparison that sees a missing backward reduction, a doubled one and a norm's gradient that is only
a rank's part: forward, logits and loss are right in all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_blame import blame, depart_forward
from pytest_gputrain.tensor_parallel.golden_communication import against_plan
from pytest_gputrain.tensor_parallel.golden_forward import departing, judge
from pytest_gputrain.tensor_parallel.golden_gradients import Gradients, compare_gradients
from pytest_gputrain.tensor_parallel.golden_inputs import SHAPES, inputs
from pytest_gputrain.tensor_parallel.golden_last_digit import without_rounding
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_rounding import gradient_rounding
from pytest_gputrain.tensor_parallel.golden_sequence import leaves_over, sequence_is_cut
from pytest_gputrain.tensor_parallel.golden_step import compare_step
from pytest_gputrain.tensor_parallel.golden_vacuity import replica_findings
from pytest_gputrain.tensor_parallel.records import (
    BackwardRecord,
    CommunicationRecord,
    GradientRecord,
    InputRecord,
)


def compare_backward(
    case: TrainingCase, mesh: Any, *, batch_size: int = 2, seed: int = SEED
) -> BackwardRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    The loss of one batch of the case's own length, and ``backward()``; then of one more of another shape,
    told only where it is wrong. Raises ComparisonError where nothing can be compared, and what the case's own
    code raises.
    """
    pair = Pair(case, mesh, seed=seed)
    batch = pair.reference_batch(batch_size)
    order = _arrivals(pair.reference)
    golden = pair.ask_reference(batch, gradients=True)
    wanted = Gradients.of(pair.reference, order)
    if not wanted.total:
        raise ComparisonError(
            "the reference's gradients are all zero or missing, so that nothing can be compared"
        )
    wanted = replace(wanted, rounding=gradient_rounding(pair, batch))
    pair.parallelize()
    answer = pair.ask_parallel(batch, gradients=True)
    forward = judge(pair, batch, golden, answer)
    records = without_rounding(pair, batch, wanted, compare_gradients(pair, wanted))
    layers, layer, cause = blame(pair, batch, records)
    if layer is not None and case.has_own_step and not forward.problem:
        records = _after_own_step(pair, batch, records)
        if not any(record.problem for record in records):
            layers, layer, cause = [], None, ""
    problem = pair.problem or pair.weights.problem
    if problem is None and forward.problem:
        layer, cause = depart_forward(pair, batch)
        problem = f"{forward.problem}{departing(layer, cause)}"
    problem = problem or _problem(records, forward, layer, cause)
    counted, problem = _with_collectives(pair, batch, problem)
    del wanted, golden, answer  # as large as the model; the next ones take their place
    # Replicas last: where the case has a step of its own, it moves weights.
    problem = problem or _other_shape(pair, order) or _of_replicas(pair, batch)
    return BackwardRecord(
        world_size=pair.world.size,
        forward=forward,
        gradients=tuple(records),
        weights=tuple(pair.weights.records),
        layers=tuple(layers),
        not_compared=tuple(_not_compared(pair, records)),
        first_layer=layer,
        first_cause=cause,
        communication=counted,
        simulated=pair.world.simulated,
        problem=problem,
        notes=tuple(pair.notes),
    )


def _with_collectives(pair: Pair, batch: Any, problem: str | None) -> tuple[CommunicationRecord, str | None]:
    """What the layers communicate, against the plan; the problem known before keeps the first line."""
    counted = against_plan(pair, batch)
    told = [f"collectives: {line}" for line in counted.told()]
    pair.notes += told
    return counted, "\n  ".join([problem, *told[:1]]) if problem else counted.problem


def _of_replicas(pair: Pair, batch: Any) -> str | None:
    """What is wrong with gradients of parameters that every rank holds whole."""
    differing = replica_findings(pair, batch)
    pair.notes += [finding.message for finding in differing if not finding.fails]
    return next((finding.message for finding in differing if finding.fails), None)


def _other_shape(pair: Pair, order: list[str]) -> str | None:
    """What is wrong with gradients of the first of other inputs that reference and plan take; collective.

    The reference is asked after ``parallelize`` here, which was found to have left it as it was.
    """
    batch = next(iter(_other_batches(pair)), None)
    if batch is None:
        return None
    pair.expect_same([batch])
    pair.reference.zero_grad(set_to_none=True)
    golden = pair.ask_reference(batch, gradients=True)
    wanted = Gradients.of(pair.reference, order)
    if pair.problem or not wanted.total:
        return pair.problem
    wanted = replace(wanted, rounding=gradient_rounding(pair, batch))
    pair.parallel.zero_grad(set_to_none=True)
    forward = judge(pair, batch, golden, pair.ask_parallel(batch, gradients=True))
    records = without_rounding(pair, batch, wanted, compare_gradients(pair, wanted))
    if any(record.problem for record in records) and pair.case.has_own_step and not forward.problem:
        records = _after_own_step(pair, batch, records)
    layer = next((record.layer for record in records if record.problem), None)
    problem = forward.problem or _problem(records, forward, layer, "")
    return problem and f"for an input of {forward.input_shape}, unlike the first one: {problem}"


def _other_batches(pair: Pair) -> Iterator[Any]:
    """Those of the forward's shapes that the reference takes and whose sequence the ranks divide."""
    divides = [(rows, length) for rows, length in SHAPES if not length % pair.world.size]
    for batch, _ in inputs(pair.case, [*SHAPES[:1], *divides], pair.device, pair.seed):
        try:
            pair.ask_reference(batch)
        except Exception:
            continue
        if not (sequence_is_cut(pair, [batch]) and leaves_over(pair, batch)):
            yield batch


def _arrivals(model: torch.nn.Module) -> list[str]:
    """Names of parameters, filled in the order in which their gradients arrive."""
    order: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    return order


def _after_own_step(pair: Pair, batch: Any, records: list[GradientRecord]) -> list[GradientRecord]:
    """The gradients that the case's own step hands on, where those are right: it may sum what is partial."""
    record = compare_step(pair, batch, 1.0)
    if record is None or record.problem:
        return records
    pair.notes.append("gradients are right at the optimizer: the case's step makes them so after backward")
    return list(record.gradients)


def _not_compared(pair: Pair, records: list[GradientRecord]) -> list[tuple[str, str]]:
    known = {record.name for record in records}
    known |= {name for name, p in parameters_of(pair.reference).items() if not p.requires_grad}
    return [
        (record.name, record.problem or "not found in the parallel model")
        for record in pair.weights.records
        if record.name not in known
    ]


def _problem(
    records: list[GradientRecord], forward: InputRecord, layer: str | None, cause: str
) -> str | None:
    wrong = [record for record in records if record.problem]
    if not wrong:
        return None
    first = wrong[0]
    off = forward.difference.largest if forward.difference else 0.0
    loss_off = max(abs(loss - forward.golden_loss) for loss in forward.losses)
    what = "logits" if forward.output.startswith("logits") else "outputs"
    before = f"{what} agree ({off:.0e}), loss agrees ({loss_off:.0e}), but "
    where = layer or first.layer
    more = f" ({len(wrong)} of {len(records)} gradients are wrong)"
    why = f" ({cause})" if cause else ""
    lines = [f"{before}{first.problem}{more}", f"  first layer to depart, going backward: {where}{why}"]
    if first.difference is not None:
        lines.append(f"  {first.difference}")
    return "\n".join(lines)
