"""Everything that a report's folder holds: ``report.json``, ``summary.md``, ``index.html``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pytest_gputrain.report import files
from pytest_gputrain.report.compare import Comparison
from pytest_gputrain.report.earlier import SUMMARY
from pytest_gputrain.report.gather import gather
from pytest_gputrain.report.model import File, Report
from pytest_gputrain.report.nights import Night
from pytest_gputrain.report.page import write_page
from pytest_gputrain.report.page_compared import Compared, Mark
from pytest_gputrain.report.page_nights import NightBar
from pytest_gputrain.report.reading import REPORT
from pytest_gputrain.report.records import FOLDER, read_records
from pytest_gputrain.report.summary import summary

# What else this package leaves in a report's folder, by where it is.
_BESIDE = (
    ("eager against compiled", "compile/*.md"),
    ("tensor parallel", "*_test_report.txt"),
    ("tensor parallel", "tp/*_test_report.txt"),
    ("which test held which GPU (for ui.perfetto.dev)", "leases.trace.json"),
)


def write_all(
    report: Report, folder: Path, *, compared: Comparison | None = None, nights: Sequence[Night] = ()
) -> Report:
    """All three files; returns the report with what lies beside it. Raises OSError."""
    beside = [File(title, path.relative_to(folder).as_posix()) for title, pattern in _BESIDE
              for path in sorted(folder.glob(pattern))]  # fmt: skip
    known = {file.path for file in report.files}
    report = replace(report, files=(*report.files, *(file for file in beside if file.path not in known)))
    document = files.to_json(report)
    files.write_text(folder / REPORT, files.as_text(document))
    told = None if compared is None else str(compared)
    files.write_text(folder / SUMMARY, summary(report, compared=told))
    write_page(
        document,
        folder,
        compared=_compared(compared),
        nights=[bar_of(one) for one in nights],
        earlier=compared.before if compared else (),
    )
    return report


def write_gathered(folder: Path, session: str | None = None) -> Report:
    """The report of the records in the folder. Raises ReportError, one line, or OSError."""
    return write_all(gather(read_records(folder), session), folder)


def has_records(folder: Path) -> bool:
    """Whether processes of a session have written there."""
    return any((folder / FOLDER).glob("*.jsonl"))


def _compared(comparison: Comparison | None) -> Compared | None:
    if comparison is None:
        return None
    marks = [Mark(change.kind, change.test, change.text) for change in comparison.marks]
    return Compared(comparison.other, marks, comparison.notes)


def bar_of(night: Night) -> NightBar:
    """A night in the strip of the page."""
    return NightBar(night.date, night.verdict, night.passed, night.failed, night.skipped, night.seconds)
