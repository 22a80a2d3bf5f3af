"""The records of a session, a line of JSON a moment and a file a process: a dead process leaves its part.

Files are ``records/HOST-PROCESS-PID.jsonl`` in the report's folder. Each begins with a line that says whose
it is and ends, where its process came to its end, with one that says how. A last line that was cut off is
left out with a note; one in the middle is refused. Pure.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pytest_gputrain.report.codec import plain
from pytest_gputrain.report.reading import VERSION, ReportError

FOLDER = "records"
MAIN = "main"  # the process that began the session; of pytest-xdist, the controller

# The events. BEGIN opens a file and END closes it; a test without DONE was running at the end of its file.
BEGIN, COLLECTED, DESELECTED, START, DONE, CRASH, END = (
    "begin",
    "collected",
    "deselected",
    "start",
    "done",
    "crash",
    "end",
)


class Recorder:
    """Appends to one process's file; each line is with the system when ``line`` returns.

    Making one raises OSError. Where a line cannot be written later on, as on a full disk, no more are: the
    tests go on, and ``broken`` says why their records end.
    """

    def __init__(self, folder: Path, host: str, process: str) -> None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        readable = re.sub(r"[^\w.]+", "-", host)[:60]
        name = f"{readable}-{process}-{os.getpid()}"
        self._file: IO[str] = _new_file(folder / FOLDER, name)
        self._pid = os.getpid()
        self.broken = ""

    def line(self, event: str, **fields: Any) -> None:
        """Add a line; nothing after ``close``, and nothing in a forked child, whose file this is not."""
        if self._file.closed or os.getpid() != self._pid:
            return
        try:
            self._file.write(json.dumps({"event": event, **plain(fields)}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            self.broken = str(error)
            self.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written it tries again
            self._file.close()


def _new_file(folder: Path, name: str) -> IO[str]:
    """A process that runs one session inside of another has a file for each."""
    for number in itertools.count(1):
        path = folder / (f"{name}.jsonl" if number == 1 else f"{name}-{number}.jsonl")
        with suppress(FileExistsError):
            return path.open("x", encoding="utf-8", errors="replace")
    raise AssertionError("counting has no end")


def new_session() -> str:
    """A session's name: when it began, and the process that begins it."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{time.time_ns() // 1000 % 10**6:06}"


@dataclass(frozen=True)
class Records:
    """One file. begin: its first line; lines: the others; whole: nothing of it is missing."""

    name: str
    begin: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    whole: bool
    notes: tuple[str, ...] = ()

    @property
    def session(self) -> str:
        return str(self.begin["session"])

    @property
    def process(self) -> str:
        return str(self.begin["process"])

    @property
    def end(self) -> Mapping[str, Any] | None:
        return self.lines[-1] if self.lines and self.lines[-1]["event"] == END else None

    @property
    def last(self) -> float:
        """When its last line was written, in seconds since the epoch."""
        return float((self.lines[-1] if self.lines else self.begin)["at"])

    def of(self, event: str) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


def read_records(folder: Path) -> list[Records]:
    """What the processes of all sessions in a report's folder wrote; empty files tell nothing.

    Raises ReportError, one line, for a file that is none of ours or corrupt in the middle.
    """
    found = [read_file(path) for path in sorted((folder / FOLDER).glob("*.jsonl"))]
    return [records for records in found if records is not None]


def read_file(path: Path) -> Records | None:
    """One file; None where not even its first line is whole. Raises ReportError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror or error})") from None
    rows = text.split(b"\n")
    torn = rows.pop()  # after the last newline: empty unless its process ended while it wrote
    lines = []
    for number, row in enumerate(rows, 1):
        lines.append(_line(row, path, number))
    if not lines:
        return None
    begin = lines[0]
    if begin["event"] != BEGIN or begin.get("version") != VERSION:
        raise ReportError(
            f"{path}: its first line is {begin['event']!r} of version {begin.get('version')!r}; this reads "
            f"{BEGIN!r} of version {VERSION}: use the gputrain that wrote it"
        )
    if lacking := [name for name in ("session", "process", "host", "at") if name not in begin]:
        raise ReportError(f"{path}: its first line lacks {', '.join(lacking)}")
    notes = (f"{path.name}: its last line was cut off and is left out",) if torn.strip() else ()
    whole = not notes and len(lines) > 1 and lines[-1]["event"] == END
    return Records(path.name, begin, lines[1:], whole, notes)


def _line(row: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(row)
    except ValueError:
        line = None
    known = isinstance(line, dict) and isinstance(line.get("event"), str)
    if not known or not _number(line.get("at")):
        raise ReportError(
            f"{path}: line {number} is corrupt, and it is not the last one: the file was damaged after "
            "it was written; remove that line to go on without what it told"
        )
    for name, kind in _NEEDED.get(line["event"], {}).items():
        if not isinstance(line.get(name), kind):
            raise ReportError(f"{path}: line {number} ({line['event']}) lacks {name!r}; remove that line")
    found: dict[str, Any] = line
    return found


# What the events need beside the moment they are of.
_NEEDED: dict[str, dict[str, type]] = {
    COLLECTED: {"ids": list},
    DESELECTED: {"reason": str, "count": int, "ids": list},
    START: {"id": str},
    DONE: {"test": dict},
    CRASH: {"id": str, "worker": str},
}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
