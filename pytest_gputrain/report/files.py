"""``report.json`` on disk: written whole or not at all, and read back as what the model says it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_gputrain.report.codec import decode, encode
from pytest_gputrain.report.model import Report
from pytest_gputrain.report.reading import REPORT, ReportError, load_report
from pytest_gputrain.whole_files import replacing


def load(path: Path) -> Report:
    """The report of a file, or of the folder that holds ``report.json``.

    Raises ReportError (a ValueError), one line, for what is not there or no report of this version.
    """
    file = path / REPORT if path.is_dir() else path
    document = load_report(file)
    try:
        report = decode(Report, document)
    except ReportError as error:
        raise ReportError(f"{file}: {error}") from None
    for index, test in enumerate(report.tests):
        if not 0 <= test.machine < len(report.machines):
            raise ReportError(
                f"{file}: tests[{index}].machine is {test.machine}; it has to be one of the "
                f"{len(report.machines)} machines, counted from 0"
            )
    return report


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON, what it is first."""
    document: dict[str, Any] = encode(report)
    return {"schema": document["schema"], "version": document["version"]} | document


def write(report: Report, folder: Path) -> Path:
    """``report.json`` in the folder, which is made. Raises OSError."""
    return write_text(folder / REPORT, as_text(to_json(report)))


def as_text(document: dict[str, Any]) -> str:
    """The report's text, a line a test: so that any tool can compare two of them."""
    tests = document["tests"]
    head = {name: value for name, value in document.items() if name != "tests"}
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    rows = ",\n".join(json.dumps(test, ensure_ascii=False, allow_nan=False) for test in tests)
    return f'{text[:-2]},\n "tests": [\n{rows}\n ]\n}}\n'


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all: a reader never sees half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        # Halves of surrogate pairs are replaced: a name that cannot be written is no reason for no report.
        unfinished.write_text(text, encoding="utf-8", errors="replace")
    return path
