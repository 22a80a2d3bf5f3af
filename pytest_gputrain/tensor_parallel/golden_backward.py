"""Every parameter's gradient against the reference's, and where they depart first, going backward.

The one comparison that sees a missing backward reduction, a doubled one and a norm's gradient that is only
a rank's part: forward, logits and loss are right in all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_accumulate import note_accumulation
from pytest_gputrain.tensor_parallel.golden_blame import blame, depart_forward
from pytest_gputrain.tensor_parallel.golden_borders import Borders
from pytest_gputrain.tensor_parallel.golden_communication import against_plan
from pytest_gputrain.tensor_parallel.golden_forward import departing, judge
from pytest_gputrain.tensor_parallel.golden_gradients import Gradients, compare_gradients
from pytest_gputrain.tensor_parallel.golden_inputs import SHAPES, inputs, shape_of
from pytest_gputrain.tensor_parallel.golden_last_digit import without_rounding
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError, parameters_of
from pytest_gputrain.tensor_parallel.golden_outputs import Answer
from pytest_gputrain.tensor_parallel.golden_padding import padding_problem
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_rounding import gradient_rounding
from pytest_gputrain.tensor_parallel.golden_sequence import left_out
from pytest_gputrain.tensor_parallel.golden_step import compare_step
from pytest_gputrain.tensor_parallel.golden_vacuity import replica_findings
from pytest_gputrain.tensor_parallel.records import InputRecord
from pytest_gputrain.tensor_parallel.records_backward import (
    BackwardRecord,
    CommunicationRecord,
    GradientRecord,
    LayerRecord,
)


@dataclass(frozen=True)
class _Compared:
    """One batch: outputs, gradients, and the layer at fault. problem: None where all is right."""

    forward: InputRecord
    records: list[GradientRecord]
    layers: list[LayerRecord]
    layer: str | None
    cause: str
    problem: str | None


def compare_backward(
    case: TrainingCase, mesh: Any, *, batch_size: int = 2, seed: int = SEED
) -> BackwardRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    The loss of one batch of the case's own length, and ``backward()``; then of one more of another shape,
    with tokens at the borders of the vocabulary's parts, told only where it is wrong. Raises ComparisonError
    where nothing can be compared, and what the case's own code raises.
    """
    pair = Pair(case, mesh, seed=seed)
    batch = pair.reference_batch(batch_size)
    order = _arrivals(pair.reference)
    golden, wanted = _ask_reference(pair, batch, order)
    if not wanted.total:
        raise ComparisonError(
            "the reference's gradients are all zero or missing, so that nothing can be compared"
        )
    pair.parallelize()
    first = _compare(pair, batch, golden, wanted)
    problem = pair.problem or pair.weights.problem or first.problem or _of_padding(pair, batch, wanted)
    counted, problem = _with_collectives(pair, batch, problem)
    del wanted, golden  # as large as the model; the next ones take their place
    # Replicas last: where the case has a step of its own, it moves weights.
    if problem is None:
        note_accumulation(pair, batch, order)
    problem = problem or _other_shape(pair, order) or _of_replicas(pair, batch)
    return BackwardRecord(
        world_size=pair.world.size,
        forward=first.forward,
        gradients=tuple(first.records),
        weights=tuple(pair.weights.records),
        layers=tuple(first.layers),
        not_compared=tuple(_not_compared(pair, first.records)),
        first_layer=first.layer,
        first_cause=first.cause,
        communication=counted,
        simulated=pair.world.simulated,
        problem=problem,
        notes=tuple(pair.notes),
    )


def _ask_reference(pair: Pair, batch: Any, order: list[str]) -> tuple[Answer, Gradients]:
    """What it answers, and its gradients; they are those of this batch alone."""
    pair.reference.zero_grad(set_to_none=True)
    golden = pair.ask_reference(batch, gradients=True)
    wanted = Gradients.of(pair.reference, order)
    if wanted.total:
        wanted = replace(wanted, rounding=gradient_rounding(pair, batch))
    return golden, wanted


def _compare(pair: Pair, batch: Any, golden: Answer, wanted: Gradients) -> _Compared:
    """The parallel model beside what the reference answered; collective."""
    pair.parallel.zero_grad(set_to_none=True)
    forward = judge(pair, batch, golden, pair.ask_parallel(batch, gradients=True))
    records = without_rounding(pair, batch, wanted, compare_gradients(pair, wanted))
    layers, layer, cause = blame(pair, batch, records)
    if layer is not None and pair.case.has_own_step and not forward.problem:
        records = _after_own_step(pair, batch, records)
        if not any(record.problem for record in records):
            layers, layer, cause = [], None, ""
    problem = _problem(records, forward, layer, cause)
    if forward.problem and not (pair.problem or pair.weights.problem):
        layer, cause = depart_forward(pair, batch)
        problem = departing(forward.problem, layer, cause)
    return _Compared(forward, records, layers, layer, cause, problem)


def _with_collectives(pair: Pair, batch: Any, problem: str | None) -> tuple[CommunicationRecord, str | None]:
    """What the layers communicate, against the plan; the problem known before keeps the first line.

    But where what ranks send each other is read too early: what is wrong then is so by chance.
    """
    counted = against_plan(pair, batch)
    told = [f"collectives: {line}" for line in counted.told()]
    pair.notes += told
    if counted.early:
        return counted, "\n  ".join([counted.early[0], *(problem or "").splitlines()[:1]])
    return counted, "\n  ".join([problem, *told[:1]]) if problem else counted.problem


def _of_padding(pair: Pair, batch: Any, wanted: Gradients) -> str | None:
    if not any(record.padding for record in pair.weights.records):
        return None
    pair.parallel.zero_grad(set_to_none=True)
    pair.ask_parallel(batch, gradients=True)
    return padding_problem(pair, wanted.total)


def _of_replicas(pair: Pair, batch: Any) -> str | None:
    """What is wrong with gradients of parameters that every rank holds whole."""
    differing = replica_findings(pair, batch)
    pair.notes += [finding.message for finding in differing if not finding.fails]
    return next((finding.message for finding in differing if finding.fails), None)


def _other_shape(pair: Pair, order: list[str]) -> str | None:
    """What is wrong with the first of other inputs that reference and plan take; collective.

    Its tokens are those at the borders of the vocabulary's parts, which other batches seldom have. The
    reference is asked after ``parallelize`` here, which was found to have left it as it was.
    """
    batch = next(iter(_other_batches(pair)), None)
    if batch is None:
        return None
    pair.expect_same([batch])
    if pair.problem:
        return pair.problem
    borders = Borders(pair)
    with borders:
        problem = _problem_of(pair, borders.targets(batch), order)
    if problem and borders.asks:
        plainly = _problem_of(pair, batch, order)
        if plainly is None:
            return borders.tell(problem) if borders.replaced() else None
        problem = plainly
    return problem and f"for an input of {shape_of(batch)}, unlike the first one: {problem}"


def _problem_of(pair: Pair, batch: Any, order: list[str]) -> str | None:
    golden, wanted = _ask_reference(pair, batch, order)
    return _compare(pair, batch, golden, wanted).problem if wanted.total else None


def _other_batches(pair: Pair) -> Iterator[Any]:
    """Those of the forward's shapes that the reference takes and that the ranks divide, or get through."""
    divides = [(rows, length) for rows, length in SHAPES if not length % pair.world.size]
    for batch, _ in inputs(pair.case, [*SHAPES[:1], *divides], pair.device, pair.seed):
        try:
            pair.ask_reference(batch)
        except Exception:
            continue
        if not any(left_out(pair, [batch], gradients=True)):
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
    lines = [
        departing(first.problem or "", layer or first.layer, cause, "backward"),
        f"  {len(wrong)} of {len(records)} gradients are wrong; {what} agree ({off:.0e}), loss agrees "
        f"({loss_off:.0e})",
    ]
    if first.difference is not None:
        lines.append(f"  {first.difference}")
    return "\n".join(lines)
