"""What ``gputrain check`` makes of its results: a table as they come, files, the last line, the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pytest_gputrain.cli import check_baseline, check_report
from pytest_gputrain.cli.arguments import EXIT_FAILED, EXIT_NOTHING_RAN, EXIT_OK
from pytest_gputrain.schemas import head

if TYPE_CHECKING:
    from pytest_gputrain.checks import CheckResult
    from pytest_gputrain.report.gate import Baseline, Gate

LINE_WIDTH = 120  # of a message in the table; it stands below in full


def table(cases: list[str], checks: Sequence[str]) -> Callable[[CheckResult], None]:
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
        return f"{name} {('; ' if name == 'notes' else ' ').join(map(str, value))}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _cut(text: str) -> str:
    return text if len(text) <= LINE_WIDTH else text[: LINE_WIDTH - 3] + "..."


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0]


def finish(
    results: list[CheckResult],
    options: argparse.Namespace,
    recording: check_report.Recording,
    baseline: Baseline | None = None,
) -> int:
    """Shows what is bad, writes what is asked for, and returns the exit code."""
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
        **head("gputrain.check"),
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
