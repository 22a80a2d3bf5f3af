"""``gputrain check``: the shipped checks without pytest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.cli import check_baseline, check_report, check_results, check_stability
from pytest_gputrain.cli.arguments import (
    LIST,
    UsageError,
    add_deadlines,
    backend,
    device,
    file,
    flag_of,
    folder,
    ranks,
)
from pytest_gputrain.cli.check_waiting import TELLS_ITSELF, waiting

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.checks import CheckResult
    from pytest_gputrain.report.gate import Baseline

NO_CASE = (
    "no case given, so the bundled reference models are checked; for a model of yours: "
    "gputrain check MODULE:ATTR (docs/cases.md)"
)


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    check = commands.add_parser(
        "check",
        help="run the shipped checks over training cases",
        description="Run the shipped checks over your training cases, or over the embedded reference models.",
        epilog="Exit codes: 0 passed, 1 failed, 2 bad input, 5 nothing ran (all skipped), 130 interrupted.",
    )
    check.set_defaults(run=_check)
    add = check.add_argument
    add("specs", nargs="*", metavar="MODULE:ATTR", help="training cases (default: the reference models)")
    add("--gputrain-case", action="append", metavar="MODULE:ATTR", help="the same, spelled as in pytest")
    add("--checks", metavar=LIST, help="ids of the checks to run (default: all)")
    add("--world-size", type=ranks, default=2, metavar="N", help="number of ranks (default: 2)")
    add("--device", type=device, default="cpu", help="cpu (gloo, the default) or cuda (nccl)")
    add("--share-gpu", action="store_true", help="with cuda: ranks that outnumber the GPUs share by gloo")
    add(
        "--compile-backend",
        type=backend,
        metavar="NAME",
        help="in inductor's place (default on cpu: aot_eager)",
    )
    add(
        "--compile-report",
        type=folder,
        metavar="DIR",
        help="tables and pictures of eager against compiled, from the compile checks",
    )
    add("--simulated", action="store_true", help="tensor-parallel checks on ranks simulated in one process")
    add_deadlines(check)
    add("--tp-report", type=folder, metavar="DIR", help="report of the tensor-parallel checks, a file a case")
    check_report.declare(check)
    check_stability.declare(check)
    check_baseline.declare(check)
    add("--json", type=file, metavar="FILE", help="also write the results there")


def _check(options: argparse.Namespace) -> int:
    from pytest_gputrain.case import CaseError
    from pytest_gputrain.checks import all_check_ids
    from pytest_gputrain.launch import LaunchUsageError

    ids = _selected(options.checks, tuple(all_check_ids()))
    options.share_gpu = options.share_gpu or flag_of("GPUTRAIN_SHARE_GPU")
    _require_gpus(options)
    check_report.implied(options)
    given = [*options.specs, *(options.gputrain_case or ())]
    specs = given or os.environ.get("GPUTRAIN_CASE", "").replace(",", " ").split()
    cases = _cases(specs)
    _set_launcher(options)
    settings = _settings(options)
    check_stability.show_progress()
    try:
        _refuse_early(cases, settings)
        baseline = check_baseline.opened(options, [case.name for case in cases], ids)
        if not specs:
            print(NO_CASE, flush=True)
        return _run(cases, ids, options, settings, baseline)
    except (CaseError, LaunchUsageError) as error:
        raise UsageError(str(error)) from None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a check is run with, by ``run_checks``'s names."""
    return {
        "device": options.device,
        "world_size": options.world_size,
        "timeout": options.timeout,
        "compile_backend": options.compile_backend,
        "simulated": options.simulated,
        "iterations": options.iterations,
        "stability": check_stability.options_of(options),
    }


def _refuse_early(cases: Sequence[TrainingCase], settings: Mapping[str, Any]) -> None:
    """All of them before the first check: bad input is told at once, not an hour later."""
    from pytest_gputrain.checks import CheckContext
    from pytest_gputrain.checks.preflight import preflight

    context = CheckContext(**settings)
    with waiting() as line:
        for number, case in enumerate(cases, 1):
            of = f" ({number} of {len(cases)})" if len(cases) > 1 else ""
            line.at(f"{case.name}{of}: importing it, building the model, drawing one batch")
            preflight(case, context)


def _run(
    cases: Sequence[TrainingCase],
    ids: Sequence[str],
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    baseline: Baseline | None,
) -> int:
    from pytest_gputrain.checks import run_checks

    names = [case.name for case in cases]
    results: list[CheckResult] = []
    show = check_results.table(names, ids)
    with check_report.recording(options, names, ids) as recording, waiting() as line:

        def begin(case: str, check: str) -> None:
            line.at("" if check in TELLS_ITSELF else f"{case} {check}")

        def tell(result: CheckResult) -> None:
            line.over()
            recording.result(result)
            show(result)

        for case in cases:
            recording.begin_case(case)
            results += run_checks(
                case,
                checks=None if options.checks is None else list(ids),
                compile_report=options.compile_report,
                on_begin=begin,
                on_result=tell,
                **settings,
            )
        return check_results.finish(results, options, recording, baseline)


def _set_launcher(options: argparse.Namespace) -> None:
    """For the launches of checks, where an option asks for another one than the package's own."""
    from pytest_gputrain.checks.context import SESSION_LAUNCHER
    from pytest_gputrain.launch import LaunchDefaults, Launcher

    if options.stall is None and not options.share_gpu and options.report is None:
        return
    stall = {} if options.stall is None else {"stall": options.stall}
    kept = None if options.report is None else options.report / "launches"
    SESSION_LAUNCHER.set(
        Launcher(defaults=LaunchDefaults(share_gpu=options.share_gpu, artifacts=kept, **stall))
    )


def _selected(wanted: str | None, legal: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return legal
    ids = tuple(dict.fromkeys(part.strip() for part in wanted.split(",") if part.strip()))
    unknown = [check for check in ids if check not in legal]
    if unknown or not ids:
        named = ", ".join(map(repr, unknown)) or repr(wanted)
        raise UsageError(f"--checks: {named} is no check; legal are {', '.join(legal)}")
    return ids


def _require_gpus(options: argparse.Namespace) -> None:
    from pytest_gputrain.devices.sharing import lacking

    if options.device != "cuda":
        return
    if lack := lacking(options.world_size, share_gpu=options.share_gpu):
        raise UsageError(
            f"--device cuda --world-size {options.world_size} {lack}; give --device cpu or fewer ranks"
        )


def _cases(specs: list[str]) -> list[TrainingCase]:
    from pytest_gputrain.case import CaseError, load_case
    from pytest_gputrain.reference import reference_cases

    try:
        return [case for spec in specs for case in load_case(spec)] if specs else reference_cases()
    except CaseError as error:
        raise UsageError(str(error)) from None
