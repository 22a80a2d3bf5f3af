"""Windows run for a verdict: in the best precision that works, and with words where a step cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.accumulation_lab import Lab
from pytest_gputrain.checks.accumulation_plan import is_finite
from pytest_gputrain.checks.accumulation_window import Window
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped

NO_ACCUMULATION = (
    "the step takes the first micro-batch that it is given and never looks for more: it does not accumulate"
)
ONE_ONLY = "the step takes one micro-batch and refuses more, so it does not accumulate"


def best_lab(case: TrainingCase, ctx: CheckContext, *, quiet: bool = False) -> Lab:
    """In float64 if loss and step run in it, else as the case is."""
    try:
        lab = Lab(case, ctx, double=True, quiet=quiet)
        batch = lab.batch(ctx.batch_size)
        if is_finite(lab.window([batch]).gradients):
            with contextlib.suppress(TypeError):  # a loss that does not fit the model is not the step's
                lab.own([batch])
            return lab
    except Exception:  # whatever it is, the case's own precision will tell it
        pass
    return Lab(case, ctx, double=False, quiet=quiet)


def run_window(lab: Lab, parts: Sequence[Any], factor: float) -> Window:
    """Raises CheckSkipped for a step that takes one micro-batch, CheckFailed where it cannot take several."""
    try:
        window = lab.window(parts, factor)
    except Exception as error:
        refuses = isinstance(error, AssertionError | NotImplementedError) or "to unpack" in str(error)
        if refuses and len(parts) > 1:
            raise CheckSkipped(f"{ONE_ONLY}: {describe(error)}") from None
        raise CheckFailed(f"the step raises on {len(parts)} micro-batches: {describe(error)}") from None
    if not window.asked and len(parts) > 1:
        raise CheckSkipped(NO_ACCUMULATION)
    return window
