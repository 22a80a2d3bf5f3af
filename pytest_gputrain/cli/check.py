"""``gputrain check``: the shipped checks without pytest."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pytest_gputrain.cli import check_baseline, check_report
from pytest_gputrain.cli.arguments import (
    EXIT_FAILED,
    EXIT_NOTHING_RAN,
    EXIT_OK,
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

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.checks import CheckResult
    from pytest_gputrain.report.gate import Baseline, Gate

LINE_WIDTH = 120  # of a message in the table; it stands below in full
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
    check_baseline.declare(check)
    add("--json", type=file, metavar="FILE", help="also write the results there")


def _check(options: argparse.Namespace) -> int:
    from pytest_gputrain.case import CaseError
    from pytest_gputrain.checks import CheckContext, all_check_ids, run_checks
    from pytest_gputrain.checks.preflight import preflight
    from pytest_gputrain.launch import LaunchUsageError

    ids = _selected(options.checks, tuple(all_check_ids()))
    options.share_gpu = options.share_gpu or flag_of("GPUTRAIN_SHARE_GPU")
    _require_gpus(options)
    check_report.implied(options)
    given = [*options.specs, *(options.gputrain_case or ())]
    specs = given or os.environ.get("GPUTRAIN_CASE", "").replace(",", " ").split()
    cases = _cases(specs)
    _set_launcher(options)
    context = CheckContext(
        device=options.device,
        world_size=options.world_size,
        timeout=options.timeout,
        compile_backend=options.compile_backend,
        simulated=options.simulated,
    )
    results: list[CheckResult] = []
    try:
        for case in cases:  # all of them before the first check: bad input is told at once, not an hour later
            preflight(case, context)
        baseline = check_baseline.opened(options, [case.name for case in cases], ids)
        if not specs:
            print(NO_CASE, flush=True)
        show = _table([case.name for case in cases], ids)
        with check_report.recording(options, [case.name for case in cases], ids) as recording:

            def tell(result: CheckResult) -> None:
                recording.result(result)
                show(result)

            for case in cases:
                recording.begin_case(case)
                results += run_checks(
                    case,
                    checks=None if options.checks is None else list(ids),
                    device=options.device,
                    world_size=options.world_size,
                    timeout=options.timeout,
                    compile_backend=options.compile_backend,
                    compile_report=options.compile_report,
                    simulated=options.simulated,
                    on_result=tell,
                )
            return _finish(results, options, recording, baseline)
    except (CaseError, LaunchUsageError) as error:
        raise UsageError(str(error)) from None


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


def _table(cases: list[str], checks: Sequence[str]) -> Callable[[CheckResult], None]:
    """Print the head of the table and return what prints a line of it, as each check finishes."""
    name_width = max(map(len, ["case", *cases]))
    check_width = max(map(len, ["check", *checks]))

    def line(case: str, check: str, outcome: str, seconds: str, figures: str) -> None:
        text = f"{case:{name_width}}  {check:{check_width}}  {outcome:7}  {seconds:>7}  {figures}"
        print(text.rstrip(), flush=True)

    def show(result: CheckResult) -> None:
        figures = ", ".join(_figure(name, value) for name, value in _shown(result))
        # Of what did not pass the first line says more than its figures; the full text comes below.
        said = figures if result.outcome == "passed" else _cut(_first_line(result.message))
        line(result.case, result.check, result.outcome, f"{result.seconds:.1f}", said)

    line("case", "check", "outcome", "seconds", "figures")
    return show


def _shown(result: CheckResult) -> list[tuple[str, object]]:
    return [
        (name, value)
        for name, value in result.figures.items()
        if name not in check_baseline.RESERVED and _fits(value)
    ]


def _fits(value: object) -> bool:
    """Tables are for ``--json`` and reports."""
    return value != [] and not isinstance(value, dict)


def _figure(name: str, value: object) -> str:
    if isinstance(value, list):
        return f"{name} {' '.join(map(str, value))}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _cut(text: str) -> str:
    return text if len(text) <= LINE_WIDTH else text[: LINE_WIDTH - 3] + "..."


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0]


def _finish(
    results: list[CheckResult],
    options: argparse.Namespace,
    recording: check_report.Recording,
    baseline: Baseline | None = None,
) -> int:
    bad = [result for result in results if result.outcome in ("failed", "error")]
    passed = sum(result.outcome == "passed" for result in results)
    skipped = sum(result.outcome == "skipped" for result in results)
    for result in bad:
        print(f"\n== {result.case} {result.check}: {result.outcome}\n{result.message.strip()}")
    if options.json is not None:
        _write_json(results, options)
    if options.tp_report is not None:
        _write_reports(results, options)
    gate = check_baseline.judged(baseline, results, options) if baseline else None
    code = _exit_code(bool(bad), bool(passed), gate)
    recording.end(code, gate=gate)
    print(f"\n{passed} passed, {len(bad)} failed, {skipped} skipped", flush=True)
    return code


def _exit_code(bad: bool, passed: bool, gate: Gate | None) -> int:
    if bad:
        return EXIT_FAILED
    if not passed:
        print("gputrain check: no check ran, which proves nothing: exit code 5", file=sys.stderr)
        return EXIT_NOTHING_RAN
    return check_baseline.exit_code(gate) if gate else EXIT_OK


def _write_reports(results: list[CheckResult], options: argparse.Namespace) -> None:
    from pytest_gputrain.checks.tp_report import write_reports

    written = write_reports(
        results,
        options.tp_report,
        device=options.device,
        world_size=options.world_size,
        simulated=options.simulated,
    )
    if written or options.report is None:
        print("".join(f"\n{path}" for path in written) or "\nno tensor-parallel check ran: no report")


def _write_json(results: list[CheckResult], options: argparse.Namespace) -> None:
    from pytest_gputrain.origin import origin

    document = {
        "origin": {**origin(), "device": options.device, "world_size": options.world_size},
        "results": [
            {
                "case": result.case,
                "check": result.check,
                "outcome": result.outcome,
                "message": result.message,
                "figures": dict(result.figures),
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
