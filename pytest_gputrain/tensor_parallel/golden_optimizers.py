"""Weights after optimizer steps against the reference's: of torch's optimizers, and of the case's own.

Both models start each optimizer from the same weights, and compute their own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_inputs import draw
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_step import SCALES, compare_step
from pytest_gputrain.tensor_parallel.golden_trial import Trial
from pytest_gputrain.tensor_parallel.records_training import OptimizerRecord, StepRecord

STEPS = 3
# Rows of the steps' batches, in turn: what is wrong for one sample only is seen as well.
ROWS = (2, 1)
OWN = "the case's optimizer"
NAMES = ("SGD", "Adam", "RMSprop", "AdamW", "AdamW(foreach=True)", "AdamW(fused=True)", OWN)
SETTINGS = {"SGD": {"lr": 1e-2, "momentum": 0.9}, "Adam": {"lr": 1e-3}, "RMSprop": {"lr": 1e-3}}


def compare_optimizers(
    case: TrainingCase, mesh: Any, names: Sequence[str] = NAMES, *, steps: int = STEPS, seed: int = SEED
) -> OptimizerRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    names: of ``torch.optim``, with ``(foreach=True)`` or ``(fused=True)`` behind it, and ``OWN``. Raises
    ComparisonError for another one, and where nothing can be compared.
    """
    chosen = [(name, _factory(name, case)) for name in names]
    pair = Pair(case, mesh, seed=seed)
    batches = _batches(pair, steps)
    pair.expect_same(batches)
    pair.parallelize()
    trial = Trial(pair, batches)
    results = [trial.run(name, make) for name, make in chosen]
    taken = _own_steps(pair, trial, batches[0]) if case.has_own_step else []
    wrong = [step.problem for step in taken if step.problem]
    wrong += [result.problem for result in results if result.problem]
    return OptimizerRecord(
        world_size=pair.world.size,
        results=tuple(results),
        weights=tuple(pair.weights.records),
        steps=tuple(taken),
        simulated=pair.world.simulated,
        problem=pair.problem or pair.weights.problem or (wrong[0] if wrong else None),
        notes=tuple(pair.notes),
    )


def _own_steps(pair: Pair, trial: Trial, batch: Any) -> list[StepRecord]:
    """The case's own step at both sizes of gradients, and where those are right, of two micro-batches."""
    taken: list[StepRecord] = []
    for scale, parts in [*((scale, 1) for scale in SCALES), (1.0, ROWS[0])]:
        if parts > 1 and any(one.problem for one in taken):
            break
        trial.reset()
        record = compare_step(pair, batch, scale, parts)
        if record is None:
            break
        taken.append(record)
    return taken


def _factory(name: str, case: TrainingCase) -> Callable[[nn.Module], Any]:
    if name == OWN:
        return case.optimizer
    kind, _, flag = name.removesuffix(")").partition("(")
    made = getattr(torch.optim, kind, None)
    flags = {f"{one}=True": {one: True} for one in ("foreach", "fused")} | {"": {}}
    if not isinstance(made, type) or flag not in flags:
        raise ComparisonError(
            f"optimizer {name!r} is not known; give names of torch.optim, such as {', '.join(NAMES[:-1])}"
        )
    settings = {**SETTINGS.get(kind, {"lr": 1e-3}), **flags[flag]}
    return lambda model: made([p for p in model.parameters() if p.requires_grad], **settings)


def _batches(pair: Pair, steps: int) -> list[Any]:
    """Of two samples and of one; of two only where the reference takes no single one (a batch norm)."""
    drawn = [draw(pair.case, ROWS[step % len(ROWS)], pair.device, pair.seed + step) for step in range(steps)]
    try:
        for batch in drawn:
            pair.ask_reference(batch)
    except Exception:
        return [draw(pair.case, ROWS[0], pair.device, pair.seed + step) for step in range(steps)]
    return drawn
