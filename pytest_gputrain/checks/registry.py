"""The shipped checks by id, in the order in which they run. Imports no torch."""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.context import SESSION_RESULTS, SHARED_GPU, CheckContext
from pytest_gputrain.checks.result import (
    CheckFailed,
    CheckOutcome,
    CheckResult,
    CheckSkipped,
    Figures,
    Outcome,
)
from pytest_gputrain.launch.errors import LaunchUsageError

CheckFunction = Callable[[TrainingCase, CheckContext], CheckResult]
_Body = Callable[[TrainingCase, CheckContext], Figures]

# Where each check lives, so that ids are known without importing any of them.
_HOMES = {
    "gradients_arrive": "gradient_flow",
    "checkpointing_parity": "checkpointing",
    "optimizer_covers": "optimizers",
    "ddp_completes": "data_parallel",
    "ddp_parity": "parity",
    "ddp_data_differs": "data_differs",
    "accumulation_parity": "accumulation_parity",
    "accumulation_schedule": "accumulation_schedule",
    "batch_size_found": "batch_found",
    "batch_size_holds": "batch_holds",
    "compile_no_recompiles": "compile_recompiles",
    "compile_parity": "compile_parity",
    "compile_checkpoint_keys": "compile_keys",
    "batch_shapes_constant": "batch_shapes",
    "compile_speed": "compile_speed",
    "tp_forward": "tp_forward",
    "tp_backward": "tp_backward",
    "tp_optimizers": "tp_optimizers",
    "tp_memory": "tp_memory",
    "tp_training": "tp_training",
    "stable_training": "stable_training",
}


@dataclass(frozen=True)
class Check:
    """A shipped check. ``subject`` is the heading it stands under in reports."""

    id: str
    subject: str
    function: CheckFunction


_CHECKS: dict[str, Check] = {}


def check(check_id: str, *, subject: str) -> Callable[[_Body], CheckFunction]:
    """Register a body that returns its figures, or raises a CheckOutcome, as a check that never raises."""

    def decorate(body: _Body) -> CheckFunction:
        function = as_check(check_id, body)
        _CHECKS[check_id] = Check(check_id, subject, function)
        return function

    return decorate


def as_check(check_id: str, body: _Body) -> CheckFunction:
    """The body as a check: whatever it raises becomes a result."""

    @functools.wraps(body)
    def run(case: TrainingCase, ctx: CheckContext) -> CheckResult:
        return _run(check_id, body, case, ctx)

    return run


def all_check_ids() -> list[str]:
    """Every check id, in the order in which they run."""
    return list(_HOMES)


def get_check(check_id: str) -> Check:
    """The check of that id. Raises ValueError naming the legal ids."""
    if check_id not in _HOMES:
        raise ValueError(f"no check is called {check_id!r}; give some of {', '.join(_HOMES)}")
    importlib.import_module(f"pytest_gputrain.checks.{_HOMES[check_id]}")
    return _CHECKS[check_id]


def chosen_ids(checks: Iterable[str] | None) -> list[str]:
    """The ids to run: all, or those given. Raises ValueError for one that does not exist."""
    if checks is None:
        return all_check_ids()
    if isinstance(checks, str):
        raise ValueError(f"checks is the string {checks!r}; give a list of ids, [{checks!r}]")
    chosen = list(checks)
    for check_id in chosen:
        if check_id not in _HOMES:
            raise ValueError(f"no check is called {check_id!r}; give some of {', '.join(_HOMES)}")
    return chosen


def _run(check_id: str, body: _Body, case: TrainingCase, ctx: CheckContext) -> CheckResult:
    started = time.monotonic()
    outcome: Outcome = "passed"
    message = ""
    figures: Figures = {}
    SHARED_GPU.set(None)
    try:
        figures = body(case, ctx)
        message = "; ".join(figures.get("notes", ()))
    except CheckOutcome as ended:
        outcome, message, figures = _outcome(ended), ended.message, ended.figures
    except LaunchUsageError:
        raise  # bad input, which no check has looked at yet: one line and exit code 2
    except Exception as error:
        if _ends_the_session(error):
            raise
        # A defect of the check must never read as one of the user's program, nor as a pass.
        outcome, message = "error", f"the check itself failed: {describe(error)}"
    if shared := SHARED_GPU.get():
        figures = {**figures, "shared_gpu": shared}
    result = CheckResult(check_id, case.name, outcome, message, figures, time.monotonic() - started)
    if (told := SESSION_RESULTS.get()) is not None:
        told(result, ctx)
    return result


def _ends_the_session(error: Exception) -> bool:
    """Whether it is pytest.exit's, as a CI runner's SIGTERM becomes, which is about no check."""
    pytest = sys.modules.get("pytest")
    return pytest is not None and isinstance(error, pytest.exit.Exception)


def _outcome(ended: CheckOutcome) -> Outcome:
    if isinstance(ended, CheckFailed):
        return "failed"
    return "skipped" if isinstance(ended, CheckSkipped) else "error"
