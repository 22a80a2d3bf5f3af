"""Outputs and loss of the parallel model against the reference's, over several input shapes.

Blind by nature to what is wrong in backward only: a missing or doubled reduction of a gradient leaves logits
and loss as they are. ``compare_backward`` sees those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_blame import depart_forward
from pytest_gputrain.tensor_parallel.golden_borders import Borders
from pytest_gputrain.tensor_parallel.golden_communication import used_early
from pytest_gputrain.tensor_parallel.golden_gather import assemble
from pytest_gputrain.tensor_parallel.golden_inputs import SHAPES, inputs, shape_of
from pytest_gputrain.tensor_parallel.golden_likely import indivisible
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError
from pytest_gputrain.tensor_parallel.golden_outputs import Answer
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_rounding import output_rounding
from pytest_gputrain.tensor_parallel.golden_sequence import leaves_over, left_out
from pytest_gputrain.tensor_parallel.records import Difference, ForwardRecord, InputRecord


def compare_forward(
    case: TrainingCase, mesh: Any, shapes: Sequence[tuple[int, int]] = SHAPES, *, seed: int = SEED
) -> ForwardRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    shapes: (batch, length) for models of tokens, cut from batches of the case; other models get batches of
    1, 2 and 4. Raises ComparisonError where nothing can be compared, and what the case's own code raises.
    """
    pair = Pair(case, mesh, seed=seed)
    asked = _ask_reference(pair, shapes)
    pair.expect_same([batch for batch, _ in asked])
    pair.parallelize()
    records, compared = [], []
    left = left_out(pair, [batch for batch, _ in asked])
    for (batch, golden), out in zip(asked, left, strict=True):
        answer = None if out else _ask_parallel(pair, batch)
        if answer is not None:
            records.append(judge(pair, batch, golden, answer))
            compared.append(batch)
    layer, cause, problem = None, "", pair.problem or pair.weights.problem
    wrong = next((index for index, record in enumerate(records) if record.problem), None)
    if problem is None and wrong is not None:
        layer, cause = depart_forward(pair, compared[wrong])
        problem = departing(records[wrong].problem or "", layer, cause)
        if likely := indivisible(pair.reference, pair.world.size):
            problem = f"{problem}\n  likely: {likely}"
        if early := used_early(pair, compared[wrong]):  # what is wrong then is so by chance
            problem = f"{early}\n  {problem}"
    if problem is None and compared:
        problem = _at_borders(pair, compared[0])
    return ForwardRecord(
        world_size=pair.world.size,
        inputs=tuple(records),
        weights=tuple(pair.weights.records),
        simulated=pair.world.simulated,
        problem=problem,
        first_layer=layer,
        first_cause=cause,
        notes=tuple(pair.notes),
    )


def _at_borders(pair: Pair, batch: Any) -> str | None:
    """What is wrong with tokens at the borders of a vocabulary's parts, in an input that is right with
    others. The reference is asked after ``parallelize`` here, which was found to have left it as it was.
    """
    borders = Borders(pair)
    with borders:
        other = borders.targets(batch)
        if not borders.asks:
            return None
        record = judge(pair, other, pair.ask_reference(other), pair.ask_parallel(other))
        if record.problem is None or not borders.replaced():
            return None
        return borders.tell(departing(record.problem, *depart_forward(pair, other)))


def departing(problem: str, layer: str | None, cause: str, way: str = "forward") -> str:
    """The message with the first wrong layer, where one is known, in its first line."""
    first, newline, rest = problem.partition("\n")
    why = f" ({cause})" if cause else ""
    where = f"; first layer to depart, going {way}: {layer}{why}" if layer else ""
    return f"{first}{where}{newline}{rest}"


def _ask_reference(pair: Pair, shapes: Sequence[tuple[int, int]]) -> list[tuple[Any, Answer]]:
    """Every input that the reference takes. Raises what it raised where it takes none."""
    asked: list[tuple[Any, Answer]] = []
    refused: Exception | None = None
    for batch, may_be_refused in inputs(pair.case, shapes, pair.device, pair.seed):
        try:
            asked.append((batch, pair.ask_reference(batch)))
        except Exception as error:
            if not may_be_refused:
                raise
            refused = error
            pair.notes.append(
                f"the reference does not take an input of {shape_of(batch)}: {type(error).__name__}"
            )
    if not asked:  # not with another length, then: as the case makes them
        batch = pair.reference_batch()
        asked.append((batch, pair.ask_reference(batch)))
    if all(not golden.outputs for _, golden in asked) and refused is not None:
        raise refused
    return asked


def _ask_parallel(pair: Pair, batch: Any) -> Answer | None:
    """None where the sequence does not divide by the ranks and the model says so: sequence parallel may."""
    try:
        return pair.ask_parallel(batch)
    except Exception as error:
        if not leaves_over(pair, batch):
            raise
        pair.notes.append(
            f"not compared: the parallel model does not take an input of {shape_of(batch)}, whose length "
            f"does not divide by {pair.world.size} ranks: {type(error).__name__}"
        )
        return None


def judge(pair: Pair, batch: Any, golden: Answer, answer: Answer) -> InputRecord:
    """One input's record; collective."""
    world = pair.world
    golden_loss = float(_plain_loss(golden.loss))
    losses = tuple(
        world.merged({r: float(one.double().mean()) for r, one in world.whole(answer.loss).items()})
    )
    kind = golden.outputs[0][1].dtype if golden.outputs else _plain_loss(golden.loss).dtype
    kind = pair.computes_in(kind)
    loss_tolerance = apart.tolerance(apart.LOSS_TOLERANCE, kind) * max(1.0, abs(golden_loss))
    base = {
        "input_shape": shape_of(batch),
        "golden_loss": golden_loss,
        "losses": losses,
        "loss_tolerance": loss_tolerance,
    }
    if len(golden.outputs) != len(answer.outputs) or not golden.outputs:
        return _without_outputs(base, golden, answer)
    record: InputRecord | None = None
    for (path, wanted), (_, got) in zip(golden.outputs, answer.outputs, strict=True):
        one = _judge_output(pair, batch, base, _label(path, golden.by), wanted, got)
        if record is None or (one.problem and not record.problem):
            record = one
    assert record is not None
    return record


def _label(path: str, by: str) -> str:
    return f"{path} of {by}" if by else path


def _plain_loss(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ComparisonError(
            f"the case's loss(model, batch) returned {loss!r:.60}; legal is a scalar tensor"
        )
    return loss.detach()


def _without_outputs(base: dict[str, Any], golden: Answer, answer: Answer) -> InputRecord:
    count = (len(golden.outputs), len(answer.outputs))
    problem = _loss_problem(base)
    if count[0] != count[1]:
        problem = (
            f"the loss calls the model {count[0]} times in the reference and {count[1]} times in parallel"
        )
    kind = apart.kind_of(_plain_loss(golden.loss).dtype)
    return InputRecord(
        **base,
        output="loss",
        golden_shape=(),
        parallel_shape=(),
        golden_dtype=kind,
        parallel_dtype=kind,
        nonfinite=(0, 0),
        difference=None,
        tolerance=base["loss_tolerance"],
        problem=problem,
    )


def _judge_output(
    pair: Pair, batch: Any, base: dict[str, Any], label: str, wanted: torch.Tensor, got: Any
) -> InputRecord:
    world = pair.world
    assembled = assemble(got, tuple(wanted.shape), world, pair.mesh)
    allowed = apart.tolerance(apart.OUTPUT_TOLERANCE, pair.computes_in(wanted.dtype))
    facts: dict[int, tuple[tuple[int, ...], str, int, Difference | None, float]] = {}
    for rank, tensor in assembled.tensors.items():
        fits = tensor.shape == wanted.shape
        facts[rank] = (
            tuple(tensor.shape),
            apart.kind_of(tensor.dtype),
            apart.nonfinite(tensor),
            apart.difference(wanted, tensor, rank) if fits else None,
            apart.excess(wanted, tensor, allowed) if fits else float("inf"),
        )
    merged = world.merged(facts)
    worst = max(merged, key=lambda fact: fact[4])
    if allowed < worst[4] < float("inf"):
        # More than the table allows: perhaps no more than the reference's own rounding explains.
        allowed = max(allowed, output_rounding(pair, batch, label))
    record = InputRecord(
        **base,
        output=label,
        golden_shape=tuple(wanted.shape),
        parallel_shape=worst[0],
        golden_dtype=apart.kind_of(wanted.dtype),
        parallel_dtype=worst[1],
        nonfinite=(apart.nonfinite(wanted), max(fact[2] for fact in merged)),
        difference=worst[3],
        tolerance=allowed,
        gathered=assembled.dim,
    )
    return _with_problem(record, worst[4] > allowed, base)


def _with_problem(record: InputRecord, wrong: bool, base: dict[str, Any]) -> InputRecord:
    from dataclasses import replace

    of = f"{record.output} for an input of {record.input_shape}"
    problem = None
    if record.golden_shape != record.parallel_shape:
        problem = f"{of} have shape {record.parallel_shape}, not {record.golden_shape}"
    elif record.golden_dtype != record.parallel_dtype:
        problem = f"{of} are {record.parallel_dtype}, not {record.golden_dtype}"
    elif record.nonfinite[1] > record.nonfinite[0]:
        problem = f"{of} have {record.nonfinite[1]} NaN or Inf, the reference's {record.nonfinite[0]}"
    elif wrong and record.difference is not None:
        problem = (
            f"{of} are off by {record.difference.largest:.3g}\n"
            f"  allowed {record.tolerance:.3g}. {record.difference}"
        )
    return replace(record, problem=problem or _loss_problem(base))


def _loss_problem(base: dict[str, Any]) -> str | None:
    golden, losses = base["golden_loss"], base["losses"]
    off = [abs(loss - golden) if loss == loss else float("inf") for loss in losses]
    if golden != golden or max(off) <= base["loss_tolerance"]:
        return None
    rank = off.index(max(off))
    return (
        f"the loss for an input of {base['input_shape']} is {losses[rank]:.6g} on rank {rank}, not "
        f"{golden:.6g} (off by {off[rank]:.3g}, allowed {base['loss_tolerance']:.3g})"
    )
