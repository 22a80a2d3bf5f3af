"""Do A micro-batches give the gradients of one full batch, as the optimizer sees them?

The step runs on the full batch in one piece and in A pieces, from the same weights, with gradients scaled
down so that no clipping takes part. It has to be the same. Where it is not, the case's own loss, without
any step, tells whether it can be: a model whose samples depend on each other (BatchNorm, capacity, a
contrastive loss) or on random numbers gives other gradients in pieces; then the step has to give what its
pieces give one by one, and what eval mode can compare is compared there too.

Does not see several ranks; that is ``accumulation_schedule`` and ``ddp_parity``.
"""

from __future__ import annotations

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures


@check("accumulation_parity", subject="accumulation")
def check_accumulation_parity(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when the gradients of A micro-batches are not those of the full batch."""
    from pytest_gputrain.checks.accumulation_modes import judge

    figures: Figures = alone(judge, case, ctx, doing="stepping over micro-batches in one process")
    return figures
