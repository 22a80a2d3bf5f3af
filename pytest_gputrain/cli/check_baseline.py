"""``gputrain check --baseline``: what was run, held against the last good night."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.cli.arguments import EXIT_FAILED, EXIT_NOTHING_RAN, EXIT_OK, UsageError

if TYPE_CHECKING:
    from pytest_gputrain.checks import CheckResult
    from pytest_gputrain.report.gate import Baseline, Gate

# Handed over for reports (``figures["metrics"]``, ``figures["series"]``), not figures to read.
RESERVED = ("metrics", "series")


def declare(check: argparse.ArgumentParser) -> None:
    """Add the option."""
    check.add_argument(
        "--baseline",
        type=Path,
        metavar="REPORT",
        help="fail where a metric is worse than in the last good night by more than noise: "
        "report.json, its folder, or a folder of nights",
    )


def opened(options: argparse.Namespace, cases: Sequence[str], checks: Sequence[str]) -> Baseline | None:
    """The baseline asked for. Raises UsageError where it is none for these cases and checks."""
    if options.baseline is None:
        return None
    from pytest_gputrain.report.gate import open_baseline
    from pytest_gputrain.report.reading import ReportError

    try:
        return open_baseline(
            options.baseline, cases=cases, checks=checks, machine=this_machine(), device=options.device
        )
    except ReportError as error:
        raise UsageError(str(error)) from None


def judged(baseline: Baseline, results: Sequence[CheckResult], options: argparse.Namespace) -> Gate:
    """The gate's verdict, printed."""
    gate = baseline.judge([entry(result, options) for result in results], this_machine())
    print(f"\n== baseline: {gate.outcome}\n" + "\n".join(gate.lines), flush=True)
    return gate


def exit_code(gate: Gate) -> int:
    """1 for a regression; 5 where nothing was compared, which proves nothing."""
    if gate.regressions:
        return EXIT_FAILED
    if gate.nothing_compared:
        print("gputrain check: nothing was compared with the baseline: exit code 5", file=sys.stderr)
        return EXIT_NOTHING_RAN
    return EXIT_OK


def entry(result: CheckResult, options: argparse.Namespace) -> dict[str, Any]:
    """The result as an entry of report.json."""
    from pytest_gputrain.cli.check_report import test_of
    from pytest_gputrain.report.codec import encode
    from pytest_gputrain.report.known import Known

    known = Known()
    known.add_figures(result.figures, simulated=options.simulated)
    found: dict[str, Any] = encode(test_of(result, options.device, known))
    return found


def this_machine() -> dict[str, Any]:
    """What has to be alike for figures to be compared."""
    from pytest_gputrain.report import machine
    from pytest_gputrain.report.codec import encode

    found: dict[str, Any] = encode(machine.this_machine(Path.cwd()))
    return found
