"""Several epochs of the case's own steps, in a single process and in parallel, from the same weights.

What this sees beyond gradients is what a loop does with them: clipping by a rank's own norm, an optimizer
that holds other parameters than the model's, replicated parameters that drift apart, and dropout that is not
the same where activations are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_dropout import random_findings
from pytest_gputrain.tensor_parallel.golden_inputs import draw
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError, asking, parameters_of
from pytest_gputrain.tensor_parallel.golden_outputs import ask
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_vacuity import untied_findings
from pytest_gputrain.trace.digest import tensor_digest

EPOCHS, BATCHES, ROWS = 4, 4, 4
# Relative to the loss. Adam turns a gradient that is rounding into a step of full size, and steps add up.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class TrainingRecord:
    """golden: the single process's loss before each step; parallel: the same by rank. The last one is after
    the last step. epochs, batches: how many of each. drifted: replicated parameters that are not bitwise the
    same on all ranks at the end. tolerance: relative to the loss.
    """

    world_size: int
    epochs: int
    batches: int
    golden: tuple[float, ...]
    parallel: tuple[tuple[float, ...], ...]
    tolerance: float
    drifted: tuple[str, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def departs(self) -> bool:
        """Whether a loss is not the single process's, at a step behind the first."""
        return any(
            not _off(loss, golden) <= self.tolerance
            for losses in self.parallel
            for loss, golden in zip(losses[1:], self.golden[1:], strict=True)
        )

    @property
    def worst(self) -> float:
        """The largest relative difference of a loss on any rank, at any step."""
        return max(_off(loss, self.golden[step]) for rank in self.parallel for step, loss in enumerate(rank))

    def epoch(self, losses: Sequence[float], number: int) -> float:
        """The mean loss of an epoch."""
        own = losses[number * self.batches : (number + 1) * self.batches]
        return sum(own) / len(own)


def compare_training(
    case: TrainingCase, mesh: Any, epochs: int = EPOCHS, *, rows: int = ROWS, seed: int = SEED
) -> TrainingRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    Trains on the first batches of the case's stream, or on drawn ones, again in each epoch. Dropout is off,
    but in one forward that looks at nothing else. Raises ComparisonError where nothing can be compared, and
    what the case's own code raises.
    """
    pair = Pair(case, mesh, seed=seed)
    batches = _batches(pair, rows)
    pair.expect_same(batches)
    pair.parallelize()
    random = random_findings(pair, batches[0])
    with pair.world.alone():
        golden = _losses(pair, pair.reference, batches, epochs)
    _refuse_nonfinite([_only(loss) for loss in golden])
    parallel = _losses(pair, pair.parallel, batches, epochs)
    world = pair.world
    by_rank = world.merged({rank: [loss[rank] for loss in parallel] for rank in world.held})
    kind = next(iter(parameters_of(pair.reference).values())).dtype
    record = TrainingRecord(
        world_size=world.size,
        epochs=epochs,
        batches=len(batches),
        golden=tuple(_only(loss) for loss in golden),
        parallel=tuple(tuple(losses) for losses in by_rank),
        tolerance=apart.tolerance(TOLERANCE, pair.computes_in(kind)),
        drifted=tuple(_drifted(pair)),
        notes=(*pair.notes, *(finding.message for finding in random if not finding.fails)),
    )
    untied = untied_findings(pair, len(golden) - 1)
    return _judged(record, pair, [finding.message for finding in (*random, *untied) if finding.fails])


def _batches(pair: Pair, rows: int) -> list[Any]:
    """The same on all ranks: those of a tensor-parallel group work on one batch."""
    case = pair.case
    if not case.has_own_batches:
        return [draw(case, rows, pair.device, pair.seed + 1000 * number) for number in range(BATCHES)]
    with asking(pair.seed):
        drawn = list(itertools.islice(iter(case.batches()), BATCHES))
    if not drawn:
        raise ComparisonError("batches() gave no batch; it has to give the data of one epoch or more")
    return [pytree.to_device(batch, pair.device) for batch in drawn]


def _losses(pair: Pair, model: nn.Module, batches: Sequence[Any], epochs: int) -> list[dict[int, float]]:
    """By step, and once after the last, by rank held."""
    case, losses = pair.case, []
    optimizer = case.optimizer(model)
    for batch in itertools.chain.from_iterable([batches] * epochs):
        losses.append(_loss(pair, model, batch))
        with asking(pair.seed):
            case.step(model, optimizer, [pytree.map_tensors(torch.clone, batch)])
    return [*losses, _loss(pair, model, batches[0])]


def _loss(pair: Pair, model: nn.Module, batch: Any) -> dict[int, float]:
    loss = ask(pair.case, model, batch, pair.seed).loss
    return {rank: float(one.double().mean()) for rank, one in pair.world.whole(loss).items()}


def _refuse_nonfinite(losses: Sequence[float]) -> None:
    """Raises ComparisonError where a single process's own loop loses its loss: NaN equals nothing."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise ComparisonError(
                f"a single process's loss is {loss} after {step} steps, so that there is no training to "
                "compare with; mend the loop first (float16 has no room for the squares of Adam: keep "
                "weights in float32, or lower the learning rate)"
            )


def _only(by_rank: dict[int, float]) -> float:
    return next(iter(by_rank.values()))


def _drifted(pair: Pair) -> list[str]:
    """Parameters that every rank has whole, and that are no longer the same; collective."""
    parameters = parameters_of(pair.parallel)
    whole = {
        name
        for record in pair.weights.records
        if record.kind == "replicated"
        for name in record.held_as
        if name in parameters
    }
    digests = {
        name: pair.world.merged(
            {rank: tensor_digest(one) for rank, one in pair.world.pieces(parameters[name]).items()}
        )
        for name in sorted(whole)
    }
    return [name for name, by_rank in digests.items() if len(set(by_rank)) > 1]


def _judged(record: TrainingRecord, pair: Pair, found: Sequence[str]) -> TrainingRecord:
    wrong = [pair.problem, pair.weights.problem, _trajectory(record), *found, _falls(record)]
    problem = next((one for one in wrong if one), None)
    if problem is None and record.drifted:
        more = f" and {len(record.drifted) - 3} more" if len(record.drifted) > 3 else ""
        problem = (
            f"replicated parameters are not the same on all ranks after {len(record.golden) - 1} steps: "
            f"{', '.join(record.drifted[:3])}{more}"
        )
    notes = record.notes
    if not _fell(record, record.golden):
        first, last = record.epoch(record.golden, 0), record.epoch(record.golden, record.epochs - 1)
        notes = (*notes, f"the loss does not fall in a single process either ({first:.4g} to {last:.4g})")
    return replace(record, problem=problem, notes=notes)


def _trajectory(record: TrainingRecord) -> str | None:
    """The first step at which a rank's loss departs."""
    for step, golden in enumerate(record.golden):
        for rank, losses in enumerate(record.parallel):
            if not _off(losses[step], golden) <= record.tolerance:
                what = "gradients or updates are" if step else "the forward is"
                off = _off(losses[step], golden)
                return (
                    f"the loss departs from the single process's after {step} steps: {losses[step]:.6g} on "
                    f"rank {rank}, not {golden:.6g} (off by {off:.2g} of it, allowed "
                    f"{record.tolerance:.0e}); {what} wrong: "
                    f"{'tp_backward and tp_optimizers name' if step else 'tp_forward names'} the layer"
                )
    return None


def _off(loss: float, golden: float) -> float:
    if loss == golden or (loss != loss and golden != golden):
        return 0.0
    off = abs(loss - golden) / max(abs(golden), 1e-3)
    return off if off == off else float("inf")


def _falls(record: TrainingRecord) -> str | None:
    if not _fell(record, record.golden) or all(_fell(record, losses) for losses in record.parallel):
        return None
    losses = next(losses for losses in record.parallel if not _fell(record, losses))
    first, last = record.epoch(losses, 0), record.epoch(losses, record.epochs - 1)
    return f"the loss does not fall over {record.epochs} epochs: {first:.4g} to {last:.4g}"


def _fell(record: TrainingRecord, losses: Sequence[float]) -> bool:
    return record.epoch(losses, record.epochs - 1) < record.epoch(losses, 0)
