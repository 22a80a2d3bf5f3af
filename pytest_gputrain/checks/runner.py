"""``run_checks``: the shipped checks on one case, without pytest. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.compile_report_data import write_compile_report
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.preflight import preflight
from pytest_gputrain.checks.registry import chosen_ids, get_check
from pytest_gputrain.checks.result import CheckResult
from pytest_gputrain.checks.tp_plan import refuse_plan
from pytest_gputrain.endurance.plan import StabilityOptions

TENSOR_PARALLEL = "tp_"

OnBegin = Callable[[str, str], None]
OnResult = Callable[[CheckResult], None]

# A hang costs the time it takes to be sure of it: a run that has one, and is red, pays for it once.
_HANGS = ("HUNG", "TIMED_OUT")
_AFTER_A_HANG = ("ddp_parity", "ddp_data_differs", "accumulation_schedule")


def run_checks(
    case: TrainingCase,
    *,
    checks: Iterable[str] | None = None,
    device: str = "cpu",
    world_size: int = 2,
    timeout: float | None = None,
    on_begin: OnBegin | None = None,
    on_result: OnResult | None = None,
    launcher: Any = None,
    finder: Any = None,
    meter: Any = None,
    compile_report: str | Path | None = None,
    compile_backend: str | None = None,
    simulated: bool = False,
    iterations: int | None = None,
    stability: StabilityOptions | None = None,
) -> list[CheckResult]:
    """One result a check, in the order asked for (default: all, in their own order).

    timeout: seconds one launch may take; on_begin: called with case and check id before each check;
    on_result: called as each result comes; launcher: starts the ranks,
    default the package's own; finder: looks for a batch size, default ``find_batch``; meter: a loop's own
    measurement of speed, which ``compile_speed`` then judges; compile_report: a folder for tables and
    pictures of eager against compiled; compile_backend: in inductor's place, default "aot_eager" on cpu;
    simulated: the ranks of tensor-parallel checks are simulated in one process, and only these checks run
    unless others are named; iterations: exactly so many steps of ``stable_training``, default up to 300 or
    about a minute; stability: where that run is kept, and losses to compare with. A check in
    ``case.expected_failures`` that fails is ``skipped``, with the reason;
    one that passes is ``failed``. Once ``ddp_completes`` failed with a hang, ``ddp_parity`` and
    ``ddp_data_differs`` are ``skipped``. Raises ValueError (CaseError) with one line for an unknown check or
    backend, a case whose model cannot be built or whose batch cannot be drawn, or, where ``tp_*`` checks are
    named, a plan that does not fit; LaunchUsageError (a ValueError) for what no launch can be asked.
    """
    if not isinstance(case, TrainingCase):
        raise ValueError(
            f"case is a {type(case).__name__}; give a TrainingCase, or load_case('MODULE:ATTR')[0]"
        )
    ids = chosen_ids(checks)
    ctx = CheckContext(
        device=device,
        world_size=world_size,
        timeout=timeout,
        launcher=launcher,
        finder=finder,
        meter=meter,
        compile_report=None if compile_report is None else str(Path(compile_report).absolute()),
        compile_backend=compile_backend,
        simulated=simulated,
        iterations=iterations,
        stability=stability,
    )
    if simulated and checks is None:
        ids = [check_id for check_id in ids if check_id.startswith(TENSOR_PARALLEL)]
    preflight(case, ctx)
    if checks is not None and any(check_id.startswith(TENSOR_PARALLEL) for check_id in ids):
        refuse_plan(case, ctx)
    results: list[CheckResult] = []
    for check_id in ids:
        if on_begin is not None:
            on_begin(case.name, check_id)
        result = _after_a_hang(check_id, case, results) or with_expectation(
            get_check(check_id).function(case, ctx), case.expected_failures.get(check_id)
        )
        results.append(result)
        if on_result is not None:
            on_result(result)
    write_compile_report(ctx)
    return results


def _after_a_hang(check_id: str, case: TrainingCase, results: list[CheckResult]) -> CheckResult | None:
    """The check as skipped, where its ranks would only hang again."""
    if check_id not in _AFTER_A_HANG:
        return None
    for earlier in results:
        hung = earlier.outcome == "failed" and earlier.figures.get("verdict") in _HANGS
        if earlier.check == "ddp_completes" and hung:
            line = earlier.message.partition("\n")[0]
            return CheckResult(check_id, case.name, "skipped", f"ddp_completes hung: {line}")
    return None


def with_expectation(result: CheckResult, reason: str | None) -> CheckResult:
    """The result in the light of what the case's author expects of this check."""
    if reason is None or result.outcome in ("skipped", "error"):
        return result
    if result.outcome == "failed":
        message = f"expected failure ({reason}): {result.message}"
        return replace(result, outcome="skipped", message=message)
    message = f"expected to fail ({reason}), but it passed: remove {result.check} from expected_failures"
    return replace(result, outcome="failed", message=message)
