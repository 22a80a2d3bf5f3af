"""Nights: one report a night, in the order in which they began, and which of them were good. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pytest_gputrain.report.likeness import key
from pytest_gputrain.report.quantities import duration
from pytest_gputrain.report.reading import REPORT, Json, ReportError, load_report


@dataclass(frozen=True)
class Night:
    """One session. folder: where its report lies; started: ISO, UTC; seconds: as long as it came.

    verdict: the report's, ``incomplete`` also for one that passed as far as it came. commit, label: of its
    first machine.
    """

    folder: str
    session: str
    started: str
    seconds: float
    verdict: str
    passed: int
    failed: int
    skipped: int
    commit: str | None
    label: str
    report: Json = field(repr=False, compare=False)

    @property
    def good(self) -> bool:
        """It passed and came to its end: something to hold the next night against."""
        return self.verdict == "passed"

    @cached_property
    def tests(self) -> dict[tuple[str, ...], Json]:
        """By what makes two entries the same test."""
        return {key(test): test for test in self.report["tests"]}

    @property
    def date(self) -> str:
        return self.started[:10]

    @property
    def took(self) -> str:
        return duration(self.seconds)

    @property
    def when(self) -> str:
        """``2026-11-28, 4d1c2ab``: the day and the commit."""
        return f"{self.date}, {self.commit[:7]}" if self.commit else self.date

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.started[:16]}  {self.verdict:11}  {self.took:>12}  {self.commit or '':12}  {counts}"


def night_of(report: Json, folder: str = "") -> Night:
    """The report as a night."""
    session, totals = report["session"], report.get("totals") or {}
    verdict = str(report["verdict"])
    if verdict == "passed" and not session.get("complete", True):
        verdict = "incomplete"
    machines: list[Json] = report["machines"]
    first: Json = machines[0] if machines else {}
    return Night(
        folder=folder,
        session=str(session.get("id") or ""),
        started=str(session.get("started") or ""),
        seconds=float(session.get("seconds") or 0.0),
        verdict=verdict,
        passed=int(totals.get("passed") or 0),
        failed=int(totals.get("failed") or 0) + int(totals.get("error") or 0),
        skipped=int(totals.get("skipped") or 0),
        commit=first.get("commit"),
        label=str(first.get("label") or ""),
        report=report,
    )


def read_nights(paths: Iterable[Path]) -> tuple[list[Night], list[str]]:
    """The nights of report files, of report folders and of folders of those, sorted by their session's start.

    The second are lines about reports that could not be read: a corrupt night must not hide the others. One
    session given twice counts once. Raises ReportError where a path holds no report at all.
    """
    nights: dict[str, Night] = {}
    unread: list[str] = []
    for path in paths:
        for file in report_files(path):
            try:
                night = night_of(load_report(file), str(file.parent))
            except ReportError as error:
                unread.append(str(error))
                continue
            nights.setdefault(night.session or night.folder, night)
    return sorted(nights.values(), key=lambda night: (night.started, night.folder)), unread


def report_files(path: Path) -> list[Path]:
    """The report, or the reports, that a path stands for. Raises ReportError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ReportError(f"{path} is not there; give a {REPORT}, a report's folder or a folder of those")
    if (path / REPORT).is_file():
        return [path / REPORT]
    found = sorted(path.glob(f"*/{REPORT}"))
    if not found:
        raise ReportError(f"{path} holds no {REPORT}, nor do the folders in it; give a report's folder")
    return found
