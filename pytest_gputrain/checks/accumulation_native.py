"""The same in the case's own precision, within a bound that its distance to float64 gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.accumulation_sums import joined, norm
from pytest_gputrain.checks.accumulation_window import Gradients
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, Figures

if TYPE_CHECKING:
    from pytest_gputrain.checks.accumulation_judge import Judge
    from pytest_gputrain.checks.accumulation_lab import Lab

# Sums of differently rounded pieces: a few times what rounding does to the whole and to the pieces.
ROUNDINGS = 8
# Further than this from float64 is not rounding: numbers drawn in another type are other numbers.
ANOTHER = 0.5


def compare_native(case: TrainingCase, ctx: CheckContext, judge: Judge) -> Figures:
    """Raises CheckFailed where only the case's own precision makes micro-batches differ.

    The bound is ``rounding_bound`` of the full batch's and of the worst micro-batch's distance to float64,
    each the larger of the case's loss and of the step: autocast may stand in either. The step's is taken for
    each micro-batch alone, so what it does to a sum of them does not widen its own bound.
    """
    from pytest_gputrain.checks.accumulation_lab import Lab

    trial = judge.plan.trials[0]
    lab = Lab(case, ctx, double=False, quiet=False)
    full = lab.batch(judge.plan.requested)  # the same values, as the case draws them
    parts = list(case.split(full, trial.num))
    assert judge.own_full is not None
    rough = lab.own([full])[0][0]
    once, many = lab.window([full]), lab.window(parts)
    whole = max(
        distance(rough, judge.own_full),
        distance(once.gradients, judge.lab.window([judge.plan.full]).gradients),
    )
    pieces = max(
        *map(distance, lab.own(parts)[0], judge.lab.own(trial.parts)[0]),
        *map(distance, _alone(lab, parts), _alone(judge.lab, trial.parts)),
    )
    eps, kind = lab.precision()
    bound = rounding_bound(whole, pieces, trial.num, eps)
    error = distance(many.gradients, once.gradients)
    if not all(map(_finite, (whole, pieces, error))) or not norm(rough) or whole + pieces > ANOTHER:
        return {}
    if error > bound:
        raise CheckFailed(
            f"in {kind} the gradients of {trial.num} micro-batches are off by {error:.2g}, where rounding "
            f"explains {bound:.2g}; in float64 they are right\n"
            "  likely: a loss scaler, autocast or a cast in the step acts on micro-batches"
        )
    return {f"{kind} error": error, f"{kind} bound": bound}


def rounding_bound(whole: float, pieces: float, num: int, eps: float) -> float:
    """What ``num`` micro-batches may be off, relative: eight times the rounding of the full batch's and of
    the worst micro-batch's gradients, and one rounding of the parameters' type for each addition.
    """
    return ROUNDINGS * (whole + pieces) + (num + 1) * eps


def distance(one: Gradients, other: Gradients) -> float:
    """Of all gradients together, relative to ``other``; 0 where that is nothing."""
    size = norm(other)
    return norm(joined([one, other], [1.0, -1.0])) / size if size else 0.0


def _alone(lab: Lab, parts: Sequence[Any]) -> list[Gradients]:
    return [window.gradients for window in lab.apart(parts)]


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
