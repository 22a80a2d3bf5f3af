"""The same in the case's own precision, within a bound that its distance to float64 gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.accumulation_sums import joined, norm
from pytest_gputrain.checks.accumulation_window import Gradients
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, Figures

if TYPE_CHECKING:
    from pytest_gputrain.checks.accumulation_judge import Judge

# Sums of differently rounded pieces: a few times what rounding does to the whole and to the pieces.
ROUNDINGS = 8
# Further than this from float64 is not rounding: numbers drawn in another type are other numbers.
ANOTHER = 0.5


def compare_native(case: TrainingCase, ctx: CheckContext, judge: Judge) -> Figures:
    """Raises CheckFailed where only the case's own precision makes micro-batches differ.

    The bound: eight times the rounding of the full batch's and of the worst micro-batch's gradients (their
    distance to float64), and one rounding of the parameters' type for each addition.
    """
    from pytest_gputrain.checks.accumulation_lab import Lab

    trial = judge.plan.trials[0]
    lab = Lab(case, ctx, double=False, quiet=False)
    full = lab.batch(judge.plan.requested)  # the same values, as the case draws them
    parts = list(case.split(full, trial.num))
    assert judge.own_full is not None
    exact, _ = judge.lab.own(trial.parts)
    rough = lab.own([full])[0][0]
    whole = _distance(rough, judge.own_full)
    pieces = max(_distance(one, other) for one, other in zip(lab.own(parts)[0], exact, strict=True))
    once, many = lab.window([full]), lab.window(parts)
    eps, kind = lab.precision()
    bound = ROUNDINGS * (whole + pieces) + (trial.num + 1) * eps
    error = _distance(many.gradients, once.gradients)
    if not all(map(_finite, (whole, pieces, error))) or not norm(rough) or whole + pieces > ANOTHER:
        return {}
    if error > bound:
        raise CheckFailed(
            f"in {kind} the gradients of {trial.num} micro-batches are off by {error:.2g}, where rounding "
            f"explains {bound:.2g}; in float64 they are right\n"
            "  likely: a loss scaler, autocast or a cast in the step acts on micro-batches"
        )
    return {f"{kind} error": error, f"{kind} bound": bound}


def _distance(one: Gradients, other: Gradients) -> float:
    size = norm(other)
    return norm(joined([one, other], [1.0, -1.0])) / size if size else 0.0


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
