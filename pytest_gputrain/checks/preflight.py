"""The first look at a case: can its model be built and one batch be drawn, in one process of its own?

What goes wrong here is bad input, not a finding: one line, before any check starts.
"""

from __future__ import annotations

from typing import Any

from pytest_gputrain.case import CaseError, TrainingCase, pytree
from pytest_gputrain.case.loading import LazyCallable
from pytest_gputrain.case.signatures import misfit
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import all_check_ids
from pytest_gputrain.checks.result import CheckOutcome
from pytest_gputrain.endurance.expected import EXPECTABLE

_WAY_OUT = {
    "model": "model() has to build and return a torch.nn.Module without arguments",
    "batch": "batch(batch_size, device) has to return one batch of that many samples on that device",
}

# By identity, with the case kept alive: a case is looked at once in a process, not once a check.
_seen: dict[tuple[int, str | None], TrainingCase] = {}


def check_names(case: TrainingCase) -> None:
    """Raises CaseError when expected_failures names a check that does not exist."""
    legal = [*all_check_ids(), *EXPECTABLE]
    unknown = [check_id for check_id in case.expected_failures if check_id not in legal]
    if unknown:
        raise CaseError(
            f"case {case.name!r}: expected_failures names {', '.join(unknown)}, which is no check; "
            f"give some of {', '.join(legal)}"
        )


def preflight(case: TrainingCase, ctx: CheckContext) -> None:
    """Raises CaseError with one line when the case cannot be used at all."""
    from pytest_gputrain.checks.ranks import alone

    check_names(case)
    if _seen.get((id(case), ctx.compile_backend)) is case:
        return
    try:
        problem = alone(_try, case, ctx, doing="building the model and drawing one batch")
    except CheckOutcome:
        return  # a crash or a hang is a finding: the checks themselves tell it, with their launch's report
    if problem:
        raise CaseError(problem)
    _seen[id(case), ctx.compile_backend] = case


def _try(case: TrainingCase, ctx: CheckContext) -> str | None:
    from torch import nn

    from pytest_gputrain.case.loading import describe
    from pytest_gputrain.checks.session import device_of, seed_everything

    device = device_of(ctx)
    if problem := _not_found(case):
        return f"case {case.name!r}: {problem}"
    calls: dict[str, Any] = {"model": case.model, "batch": lambda: case.batch(ctx.batch_size, device)}
    made = {}
    for name, call in calls.items():
        seed_everything(ctx.seed)
        try:
            made[name] = call()
        except CaseError as error:  # a function given by name that is not there
            return f"case {case.name!r}: {error}"
        except Exception as error:
            return f"case {case.name!r}: {name}() raised {describe(error)}; {_WAY_OUT[name]}"
    if not isinstance(made["model"], nn.Module):
        return f"case {case.name!r}: model() returned a {type(made['model']).__name__}; {_WAY_OUT['model']}"
    if not pytree.tensors(made["batch"]):
        return (
            f"case {case.name!r}: batch() returned no tensor, but {made['batch']!r:.60}; {_WAY_OUT['batch']}"
        )
    return _unknown_backend(ctx)


def _not_found(case: TrainingCase) -> str | None:
    """The first function given by name that is not there, or takes other arguments: told now, not by each
    check that calls it.
    """
    for field, given in vars(case).items():
        if isinstance(given, LazyCallable):
            try:
                found = given.resolve()
            except CaseError as error:
                return str(error)
            if problem := misfit(field, found):
                return problem
    return None


def _unknown_backend(ctx: CheckContext) -> str | None:
    """Asked after the case's module was imported, which may register a backend of its own."""
    if ctx.compile_backend is None:
        return None
    from pytest_gputrain.compile.backend import validate_backend

    try:
        validate_backend(ctx.compile_backend, ctx.device)
    except ValueError as error:
        return str(error)
    return None
