"""Does the loss fall? Judged on the same batches, with the same random numbers, before training and after it.

So a stream's noise and dropout's are out of the comparison, and a low learning rate still shows. Weights that
do not move give a difference of exactly zero. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pytest_gputrain.endurance.findings import Finding

FEWEST_STEPS = 20  # after fewer a healthy loss may still be on its way up
# Rounding of a float32 loss, with room: a change below it says nothing.
ROUNDING = 2e-6
LOW_RATE = 1e-6
# Of a step's own loss over repeated batches: dropout's noise alone makes small falls.
OWN_FALL = 0.05
AT_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """before, after: losses of the same batches, in the same order; moved: whether any trained parameter is
    another; rate: the highest learning rate seen, None where unknown; again: after more training on these
    batches alone, which tells a stream that holds nothing to learn from a loop that does not learn. own: what
    the steps themselves returned for repeated batches, first and last, which may be another objective.
    takes_turns: several optimizers in a step of the case's own, of which one may climb.
    """

    before: Sequence[float]
    after: Sequence[float]
    steps: int
    moved: bool
    rate: float | None = None
    again: Sequence[float] = ()
    own: tuple[Sequence[float], Sequence[float]] = ((), ())
    takes_turns: bool = False


def judge_falling(given: Evidence) -> tuple[Finding | None, str]:
    """A finding, or a note ("" for nothing to say)."""
    before, after, again, steps, rate = given.before, given.after, given.again, given.steps, given.rate
    if not before or not all(map(math.isfinite, (*before, *after))):
        return None, ""
    if steps < FEWEST_STEPS:
        return (
            None,
            f"{steps} step{'s' * (steps != 1)} cannot show whether the loss falls ({FEWEST_STEPS} can)",
        )
    first, last = fmean(before), fmean(after)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    figures = {"before": first, "after": last, "batches": len(before)}
    if not given.moved:
        message = (
            f"the loss does not fall: no parameter moved in {steps} steps (loss {first:.4g} all along); let "
            "the step call optimizer.step() on the parameters of the model that it trains\n"
            "  likely: an optimizer made from other parameters, a learning rate of 0 or too low, or no step"
        )
        return Finding("loss", steps, None, message, figures), ""
    scale = max(abs(first), abs(last), 1e-12)
    if last < first - ROUNDING * scale:
        return None, ""
    if rate is not None and rate < LOW_RATE:
        return (
            None,
            f"a learning rate of {rate:.2g} is too low to say after {steps} steps whether the loss falls",
        )
    if scale < AT_FLOOR:
        return None, f"the loss is at its floor from the beginning ({first:.2g}), from which it cannot fall"
    if again and fmean(again) < first - ROUNDING * scale:
        return None, (
            f"the loss of the stream's first batches did not fall over {steps} steps ({first:.4g} to "
            f"{last:.4g}); trained on them alone it falls to {fmean(again):.4g}: the stream "
            "may teach nothing"
        )
    if note := _other_objective(given, first, last):
        return None, note
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    rises = fmean(changes) > max(2 * error, ROUNDING * scale)
    alone = f" (nor trained on them alone: {fmean(again):.4g})" if again else ""
    what = "rises" if rises else "does not fall"
    message = (
        f"the loss {what}: {first:.4g} before training and {last:.4g} after {steps} steps, on the same "
        f"{len(before)} batches{alone}; look at the sign of the loss and the learning rate first, or "
        "name stable_training:loss in the case's expected_failures where it need not fall\n"
        "  likely: a learning rate that is too high, a loss with the wrong sign, gradients zeroed before the "
        "step, or an optimizer that holds other parameters"
    )
    return Finding("loss", steps, None, message, figures), ""


def _other_objective(given: Evidence, first: float, last: float) -> str:
    """Why this loss may not fall although the loop is well, "" where it should."""
    stays = f"loss(model, batch) does not fall on the same batches ({first:.4g} to {last:.4g})"
    own_first, own_last = given.own
    if own_first and own_last and all(map(math.isfinite, (*own_first, *own_last))):
        fell = fmean(own_first) - fmean(own_last)
        if fell > OWN_FALL * abs(fmean(own_first)):
            return f"{stays}; what step returns does ({fmean(own_first):.4g} to {fmean(own_last):.4g})"
    if given.takes_turns:
        return f"{stays}; several optimizers take part in a step of your own, and one of them may climb"
    return ""
