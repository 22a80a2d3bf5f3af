"""What the user reads: the header, what did not run for lack of hardware, whether required GPUs were used."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

from pytest_gputrain.devices.inventory import FAKE_VARIABLE, discover
from pytest_gputrain.devices.shortage import count, describe_found, shortage
from pytest_gputrain.devices.visible import visible_gpus
from pytest_gputrain.plugin import properties
from pytest_gputrain.plugin.settings import Settings, not_default
from pytest_gputrain.plugin.settings_table import SETTINGS


def check_pretended_gpus() -> None:
    """Raise ``pytest.UsageError`` at once, not within a test, when ``GPUTRAIN_FAKE_GPUS`` cannot be read."""
    if os.environ.get(FAKE_VARIABLE):
        try:
            discover()
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def header(settings: Settings) -> list[str]:
    """Return the lines above a run: the hardware, how it was found, the settings and where they come from."""
    driver = discover().driver
    hardware = f"gputrain: GPUs found: {describe_found()}" + (f", driver {driver}" if driver else "")
    given = not_default(settings)
    shown = [
        f"{setting.option.removeprefix('--gputrain-').removeprefix('--')} "
        f"{_shown(getattr(settings, setting.field))}"
        + (f" (from {settings.origins[setting.field]})" if setting.field in given else "")
        for setting in SETTINGS
        if setting.field in given or setting.field in ("timeout", "stall")
    ]
    return [hardware, f"gputrain: {', '.join(shown)}"]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g} s" if isinstance(value, float) else str(value)


def missing_gpus(num_gpus: int) -> str | None:
    """Return why a session that requires ``num_gpus`` cannot start, or None when it can."""
    lack = shortage(num_gpus)
    return lack and f"--require-gpus {num_gpus}: {lack}; no test was run"


class Ledger:
    """Counts what ran and what could not, from reports alone: so it works under xdist, in the controller."""

    def __init__(self, require_gpus: int) -> None:
        self.require_gpus = require_gpus
        self.ran_on_gpu: set[str] = set()
        self.lacking: dict[str, set[str]] = defaultdict(set)
        self.shared: set[str] = set()
        self.verdict: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        # An xfail is reported as skipped, but ran.
        ran = report.when == "call" and (not report.skipped or hasattr(report, "wasxfail"))
        if ran and properties.SHARED in told:
            # Of a refused launch, such as one on pretended GPUs, no rank ran that could have shared one.
            if not (report.failed and properties.REFUSED in told):
                self.shared.add(report.nodeid)
        elif ran and properties.GPU in told:
            self.ran_on_gpu.add(report.nodeid)
        if report.skipped and (lack := told.get(properties.SHORTAGE)):
            self.lacking[str(lack)].add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.require_gpus or self.ran_on_gpu or session.config.getoption("collectonly"):
            return
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            but = " but those that shared one" if self.shared else ""
            self.verdict = (
                f"gputrain: --require-gpus {self.require_gpus}: no test marked gpu ran{but}, "
                "so this session proves nothing about GPUs and fails"
            )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for lack, tests in sorted(self.lacking.items()):
            terminalreporter.write_line(shortage_line(lack, len(tests)), yellow=True)
        if self.shared:
            gpus = visible_gpus(discover(), os.environ)
            terminalreporter.write_line(shared_line(len(self.shared), len(gpus)), yellow=True)
        if self.verdict:
            terminalreporter.write_line(self.verdict, red=True)


def shared_line(num_tests: int, num_gpus: int) -> str:
    """Return the sentence about tests whose ranks shared GPUs."""
    tests = f"{num_tests} test{'s' * (num_tests != 1)}"
    return f"gputrain: {tests} shared {count(num_gpus)} between ranks; nothing here is a multi-GPU result"


def shortage_line(lack: str, num_tests: int) -> str:
    """Return ``needs 2 GPUs, found …`` as a sentence about ``num_tests`` tests."""
    if num_tests == 1:
        return f"gputrain: 1 test {lack}; it did not run"
    return f"gputrain: {num_tests} tests {lack.replace('needs', 'need', 1)}; none of these ran"
