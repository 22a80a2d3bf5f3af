"""A tensor-parallel plan that cannot be carried out, told before any rank starts.

Only plans are looked at: a mapping, or the package's own ``parallelize``. A function of the user's says what
it can do when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pytest_gputrain.case import CaseError, TrainingCase
from pytest_gputrain.case.loading import LazyCallable
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed, CheckOutcome, CheckSkipped

OWN = "pytest_gputrain.tensor_parallel"

# By identity, with the case kept alive, and world size: a plan is looked at once, not once a check.
_seen: dict[tuple[int, int], tuple[TrainingCase, str | None]] = {}


def refuse_plan(case: TrainingCase, ctx: CheckContext) -> None:
    """Raises CaseError with one line where the plan does not fit the model or the number of ranks."""
    if problem := plan_problem(case, ctx):
        raise CaseError(f"case {case.name!r}: {problem}")


def end_on_bad_plan(case: TrainingCase, ctx: CheckContext) -> None:
    """The same from within a check, where others are asked for as well.

    Raises CheckFailed for a plan of the user's, CheckSkipped where the package's own does not fit.
    """
    if problem := plan_problem(case, ctx):
        raise CheckFailed(problem) if isinstance(case.parallelize, Mapping) else CheckSkipped(problem)


def plan_problem(case: TrainingCase, ctx: CheckContext) -> str | None:
    """What is wrong with the plan, in one line; None where nothing is, or where that cannot be known yet."""
    from pytest_gputrain.checks.ranks import alone

    if not _is_plan(case.parallelize):
        return None
    key = (id(case), ctx.world_size)
    if key not in _seen:
        try:
            problem = alone(_validate, case, ctx, doing="looking at the tensor-parallel plan")
        except CheckOutcome:
            problem = None  # a model that cannot be built is told by the checks, with their launch's report
        _seen[key] = case, problem
    return _seen[key][1]


def _is_plan(given: Any) -> bool:
    if isinstance(given, partial):
        given = given.func
    if isinstance(given, LazyCallable):
        return given.spec == f"{OWN}:parallelize"
    own = getattr(given, "__name__", "") == "parallelize" and getattr(given, "__module__", "").startswith(OWN)
    return own or isinstance(given, Mapping)


def _validate(case: TrainingCase, ctx: CheckContext) -> str | None:
    """In one rank: shapes are all that is needed, so the model has no memory where it can be built so."""
    from pytest_gputrain.tensor_parallel import tp_plan_for, validate_plan

    model = _on_meta(case, ctx)
    given = case.parallelize
    keywords = given.keywords if isinstance(given, partial) else {}
    try:
        plan = given if isinstance(given, Mapping) else keywords.get("plan")
        if plan is None:
            styles = {k: v for k, v in keywords.items() if k in ("sequence_parallel", "loss_parallel")}
            plan = tp_plan_for(model, **styles)
        validate_plan(model, plan, ctx.world_size)
    except ValueError as error:
        return str(error)
    return None


def _on_meta(case: TrainingCase, ctx: CheckContext) -> Any:
    import torch

    from pytest_gputrain.checks.session import seed_everything

    seed_everything(ctx.seed)
    try:
        with torch.device("meta"):
            return case.model()
    except Exception:  # code that looks at values
        return case.model()
