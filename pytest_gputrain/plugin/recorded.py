"""One test while it runs: its phases, its launches and the results of its checks, and what they come to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.plugin import properties
from pytest_gputrain.report.codec import encode
from pytest_gputrain.report.known import Known, bounded, kind_of
from pytest_gputrain.report.model import Test, TestOutcome

_BAD = ("failed", "error")


class TestRecord:
    """Becomes a ``report.model.Test``."""

    __test__ = False

    def __init__(self, item: pytest.Item, worker: str | None) -> None:
        self._id = item.nodeid
        self._worker = worker
        self._stability = item.get_closest_marker("stability") is not None
        self._distributed = item.get_closest_marker("distributed") is not None
        self.known = Known()
        self._results: list[Any] = []
        self._case, self._check, self._device = _bound(item)
        self._reports: list[pytest.TestReport] = []
        self._subtests: list[str] = []
        self._reruns = 0

    def start(self) -> dict[str, Any]:
        """What is known before it runs."""
        return {"id": self._id, "kind": self._kind(), **self._named()}

    def done(self) -> dict[str, Any]:
        """The test as JSON, once nothing of it runs any more."""
        outcome, message = self._judged(self._reports)
        self._label()
        test = Test(
            id=self._id,
            kind=self._kind(),
            outcome=outcome,
            message=bounded(message),
            seconds=round(sum(report.duration for report in self._reports), 4),
            worker=self._worker,
            **self._named(),
            **self.known.parts(),
        )
        document: dict[str, Any] = encode(test)
        return document

    def outcome_with(self, report: pytest.TestReport) -> str:
        """Its outcome, where ``report`` is the last one of it."""
        return self._judged([*self._reports, report])[0]

    def add(self, report: pytest.TestReport) -> None:
        """A phase's report; one that is to be run again forgets the phases before."""
        if report.outcome == "rerun":  # type: ignore[comparison-overlap]  # of pytest-rerunfailures
            self._reruns += 1
            self._reports.clear()
        elif type(report) is not pytest.TestReport and hasattr(report, "context"):  # a subtest's
            if report.failed:
                self._subtests.append(_message(report))
        else:
            self._reports.append(report)

    @contextlib.contextmanager
    def listening(self, folder: Path) -> Iterator[None]:
        """Have the results of checks told to this test while it runs."""
        from pytest_gputrain.checks.context import SESSION_FIGURES, SESSION_REPORT, SESSION_RESULTS

        tokens = SESSION_RESULTS.set(self._told), SESSION_REPORT.set(str(folder))
        figures = SESSION_FIGURES.set(self.known.add_figures)
        try:
            yield
        finally:
            SESSION_RESULTS.reset(tokens[0])
            SESSION_REPORT.reset(tokens[1])
            SESSION_FIGURES.reset(figures)

    def _told(self, result: Any, ctx: Any) -> None:
        self._results.append(result)
        self.known.add_figures(result.figures, simulated=ctx.simulated)
        if self._check is None:  # a test that runs checks by itself
            self._case, self._check, self._device = result.case, result.check, ctx.device

    def _named(self) -> dict[str, Any]:
        several = len({result.check for result in self._results}) > 1
        check = None if several else self._check
        return {"case": self._case, "check": check, "device": self._device}

    def _kind(self) -> Any:
        return kind_of(self._check, bool(self.known.launches) or self._distributed, self._stability)

    def _label(self) -> None:
        told = [name for report in self._reports for name, _ in report.user_properties]
        if properties.SHARED in told:
            self.known.label("shared GPU")
        if properties.LEASE in told and _pretended():
            self.known.label("pretended GPUs")
        if self._reruns:
            self.known.label(f"run {self._reruns + 1} times")
        for report in self._reports:
            if hasattr(report, "wasxfail"):
                self.known.label("expected failure" if report.skipped else "passed unexpectedly")

    def _judged(self, reports: list[pytest.TestReport]) -> tuple[TestOutcome, str]:
        """The outcome and the whole message, its first line the cause."""
        setup, call, teardown = (_phase(reports, when) for when in ("setup", "call", "teardown"))
        if setup is not None and setup.failed:
            return "error", f"in setup: {_message(setup)}"
        said = setup if setup is not None and setup.skipped else call
        if said is None:
            return "error", "no report of it came"
        outcome, message = _outcome(said, self._results), _message_of(said, self._results)
        if self._subtests:
            message = "\n\n".join([*self._subtests, message])
        if teardown is not None and teardown.failed:
            torn = f"in teardown: {_message(teardown)}"
            message = f"{message}\n\n{torn}" if outcome in _BAD else torn
            outcome = outcome if outcome in _BAD else "error"
        return outcome, message


def _phase(reports: list[pytest.TestReport], when: str) -> pytest.TestReport | None:
    return next((report for report in reversed(reports) if report.when == when), None)


def _outcome(report: pytest.TestReport, results: list[Any]) -> TestOutcome:
    if report.failed:
        judged = [result.outcome for result in results]
        # A check that could not judge fails the test; it says nothing of the user's code.
        return "error" if judged and "failed" not in judged and "error" in judged else "failed"
    return "skipped" if report.skipped else "passed"


def _message_of(report: pytest.TestReport, results: list[Any]) -> str:
    """Of a check its own words, which begin with the cause."""
    if hasattr(report, "wasxfail"):
        reason = str(report.wasxfail).removeprefix("reason: ").strip()
        if report.passed:
            return f"passed, and was expected to fail ({reason})"
        return f"expected failure ({reason}): {_message(report)}"
    if len(results) == 1 and results[0].message and _as_judged(report, results[0]):
        return str(results[0].message)
    return _message(report)


def _as_judged(report: pytest.TestReport, result: Any) -> bool:
    legal = {"passed": ("passed",), "failed": ("failed", "error"), "skipped": ("skipped",)}
    return result.outcome in legal[report.outcome]


def _message(report: pytest.TestReport) -> str:
    """The text of a failure, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    text = report.longreprtext
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return text
    # pytest begins with the source of the test; a reader wants to know first what went wrong.
    line = str(crash.message).strip().partition("\n")[0]
    if line.endswith(text.strip().partition("\n")[0]):  # of a launch or a check, which show no traceback
        return text
    return f"{line}   at {crash.path}:{crash.lineno}\n\n{text}"


def _bound(item: pytest.Item) -> tuple[str | None, str | None, str | None]:
    """Case, check and device of a test that is made for a check, known even where it skips."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    check: Any = parameters.get("check")
    if not all(hasattr(check, name) for name in ("id", "case", "ctx")):
        return None, None, None
    return str(check.case.name), str(check.id), str(check.ctx.device)


def _pretended() -> bool:
    from pytest_gputrain.devices.inventory import FAKE_VARIABLE, discover

    return discover().source == FAKE_VARIABLE
