"""``summary.md``: the report for a GitHub step summary, or any page that shows Markdown. Pure.

The verdict first, what did not run and why, the checks by case, the failures by their first lines. GitHub
refuses a summary of more than 1 MiB: it stays far below, and says what it left out.
"""

from __future__ import annotations

import re

from pytest_gputrain.report.model import Report, Test
from pytest_gputrain.report.quantities import duration, plural, quantity

MOST_BYTES = 256 * 1024
_MOST_FAILURES, _MOST_ROWS, _MOST_REASONS = 100, 200, 30
_LINE = 240  # characters of a failure's first line; the report has it whole
_FIGURES = 4  # of a check in its row
BAD = ("failed", "error", "crashed")
_MARKS = {"passed": "✅", "failed": "❌", "error": "❌", "crashed": "💥", "skipped": "⏭️"}
_WORDS = {
    "passed": "✅ passed",
    "failed": "❌ failed",
    "nothing_ran": "⚠️ nothing ran",
    "interrupted": "⚠️ interrupted",
    "incomplete": "⚠️ incomplete",
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def summary(report: Report, *, compared: str | None = None) -> str:
    """The summary as text. compared: lines about an earlier report."""
    parts = [
        _head(report),
        _not_run(report),
        _failures(report),
        _section("Compared", _fenced(compared)) if compared else "",
        _checks(report),
        _files(report),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text if len(text.encode()) <= MOST_BYTES else _cut(text)


def _cut(text: str) -> str:
    short = text.encode()[: MOST_BYTES - 200].decode(errors="ignore").rpartition("\n")[0]
    return f"{short}\n\n… cut off here; the rest is in the report.\n"


def _head(report: Report) -> str:
    totals, session = report.totals, report.session
    counts = [
        f"{getattr(totals, name)} {name}" for name in ("failed", "error", "crashed", "passed", "skipped")
        if getattr(totals, name)
    ]  # fmt: skip
    lines = [f"## gputrain: {_WORDS[report.verdict]}", ""]
    lines.append(f"{', '.join(counts) or 'no test'} in {duration(session.seconds)}, {session.started}")
    lines += ["", *(f"- {_plain(machine.label)} ({_plain(machine.host)})" for machine in report.machines)]
    told = [f"session {session.ending.replace('_', ' ')}"] if session.ending != "finished" else []
    told += [session.reason] if session.reason else []
    return "\n".join([*lines, *(f"- {_plain(note)}" for note in [*told, *session.notes][:_MOST_REASONS])])


def _not_run(report: Report) -> str:
    if not report.not_run:
        return ""
    rows = [f"- {plural(one.count, 'test')}: {_line(one.reason)}" for one in report.not_run[:_MOST_REASONS]]
    return _section("Did not run", *rows, _more(len(report.not_run), _MOST_REASONS, "reasons"))


def _failures(report: Report) -> str:
    bad = [test for test in report.tests if test.outcome in BAD]
    rows = [f"- **{_plain(test.id)}** {test.outcome}: {_line(test.headline)}" for test in bad]
    return _section("Failures", *rows[:_MOST_FAILURES], _more(len(bad), _MOST_FAILURES, "failures")) if bad \
        else ""  # fmt: skip


def _checks(report: Report) -> str:
    """A row a check, a column a case; of failures the mark alone, for their lines are above.

    The gate of a baseline is of no case: its first line stands below.
    """
    tests = [test for test in report.tests if test.check is not None and test.case is not None]
    gates = [test for test in report.tests if test.check is not None and test.case is None]
    told = [f"\n{_MARKS[test.outcome]} {_plain(test.check)}: {_line(test.headline)}" for test in gates]
    if not tests:
        return _section("Checks", *told) if told else ""
    cases = [*dict.fromkeys(_column(test) for test in tests)]
    cells: dict[str, dict[str, list[str]]] = {}
    for test in tests:
        cells.setdefault(str(test.check), {}).setdefault(_column(test), []).append(_cell(test))
    rows = [f"| check | {' | '.join(map(_plain, cases))} |", f"|---|{'---|' * len(cases)}"]
    for check, found in [*cells.items()][:_MOST_ROWS]:
        texts = ["<br>".join(found.get(case, ())) for case in cases]
        rows.append(f"| {_plain(check)} | {' | '.join(texts)} |")
    return _section("Checks", *rows, _more(len(cells), _MOST_ROWS, "checks"), *told)


def _column(test: Test) -> str:
    return f"{test.case}, {test.device}" if test.device else str(test.case)


def _cell(test: Test) -> str:
    labels = f" ({', '.join(map(_plain, test.labels))})" if test.labels else ""
    shown = figures(test) if test.outcome == "passed" else []
    return f"{_MARKS[test.outcome]} {_plain(', '.join(shown))}{labels}".rstrip()


def figures(test: Test) -> list[str]:
    """Its figures in a few words: metrics with their unit first."""
    found = [
        f"{name.replace('_', ' ')} {quantity(metric.value, metric.unit)}"
        for name, metric in test.metrics.items()
    ]
    found += [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in test.figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in test.metrics
    ]
    return found[:_FIGURES]


def _files(report: Report) -> str:
    if not report.files:
        return ""
    return _section(
        "Also in the report's folder", *(f"- {_plain(f.title)}: `{f.path}`" for f in report.files)
    )


def _section(title: str, *rows: str) -> str:
    return "\n".join([f"### {title}", "", *(row for row in rows if row)])


def _more(number: int, most: int, what: str) -> str:
    return f"\n… {number - most:,} more {what} in the report" if number > most else ""


def _line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return _plain(line if len(line) <= _LINE else line[: _LINE - 1] + "…")


def _plain(text: object) -> str:
    """Text as text: no Markdown, no HTML, no mention of anybody."""
    one_line = " ".join(str(text).split()).replace("&", "&amp;").replace("@", "@\u200b")
    return _SPECIAL.sub(r"\\\1", one_line)


def _fenced(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def line_of(report: Report) -> str:
    """For a terminal: ``failed: 2 failed, 14 passed``."""
    names = ("failed", "error", "crashed", "passed", "skipped")
    counts = [f"{getattr(report.totals, name)} {name}" for name in names if getattr(report.totals, name)]
    return f"{report.verdict.replace('_', ' ')}: {', '.join(counts) or 'no test'}"
