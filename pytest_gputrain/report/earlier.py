"""What an earlier session left in a report's folder: removed when another begins, so that one that is killed
does not leave the verdict of the one before. A session that still runs keeps its records: the last to end
writes the report, and it says that another one's are there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_gputrain.report import records
from pytest_gputrain.report.reading import REPORT, ReportError

SUMMARY, PAGE = "summary.md", "index.html"


def clear(folder: Path, host: str) -> None:
    """Removes the report there, and the records of sessions of this host that do not run any more.

    Of another host nobody here can know: only what came to its end goes.
    """
    if (folder / REPORT).exists() or (folder / records.FOLDER).is_dir():  # else the page is somebody's own
        for name in (REPORT, SUMMARY, PAGE):
            with suppress(OSError):
                (folder / name).unlink()
    found = {path: _read(path) for path in (folder / records.FOLDER).glob("*.jsonl")}
    running = {one.session for one in found.values() if one is not None and _runs(one, host)}
    for path, one in found.items():
        if one is None or one.session not in running:
            path.unlink(missing_ok=True)


def _read(path: Path) -> records.Records | None:
    with suppress(ReportError):
        return records.read_file(path)
    return None


def _runs(one: records.Records, host: str) -> bool:
    """Whether the process that began this session may still run."""
    if one.process != records.MAIN or one.end is not None:
        return False
    if one.begin.get("host") != host:
        return True
    return _is_process(one.begin)


def _is_process(begin: Any) -> bool:
    """Whether it is there, and is not another one with the same number."""
    import psutil

    pid = begin.get("pid")
    if pid == os.getpid():  # a session inside of a test of another one
        return bool(os.environ.get("PYTEST_CURRENT_TEST"))
    with suppress(psutil.Error, TypeError, ValueError):
        return psutil.Process(int(pid)).create_time() <= float(begin["at"]) + 1.0
    return False
