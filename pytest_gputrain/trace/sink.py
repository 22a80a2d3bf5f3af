"""Where traced lines go: the rank's ``traces.log`` and, where a switch asks for it, its standard output."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pytest_gputrain.trace.lines import TRACE_LOG

MOST_BYTES = 4 << 20
"""Of one rank's ``traces.log``: some 50,000 lines. A run of days must not fill the disk."""
KEPT_LINES = 200
"""The last lines, for a stack dump."""


class Sink:
    """Writes a tracer's lines; those of the tracers in ``printed`` to standard output too.

    Does nothing in a process that the rank has forked: a data-loader worker is no rank.
    """

    def __init__(self, folder: Path, printed: Sequence[str]) -> None:
        self.recent: deque[str] = deque(maxlen=KEPT_LINES)
        self._path = folder / TRACE_LOG
        self._printed = frozenset(printed)
        self._pid = os.getpid()
        self._file: IO[str] | None = None
        self._written = 0

    def write(self, tracer: str, lines: Sequence[str]) -> None:
        """Adds lines, at once: a rank that hangs in the next moment has said them."""
        if os.getpid() != self._pid or not lines:
            return
        self.recent.extend(lines)
        text = "\n".join(lines) + "\n"
        if self._written <= MOST_BYTES:
            self._append(text)
        if tracer in self._printed and sys.stdout is not None:
            with contextlib.suppress(ValueError, OSError):  # closed or replaced by the script
                sys.stdout.write(text)
                sys.stdout.flush()

    def _append(self, text: str) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._written += len(text)
        if self._written > MOST_BYTES:
            text += f"[TRACE] {MOST_BYTES >> 20} MiB are written; what comes after is not\n"
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None and os.getpid() == self._pid:
            self._file.close()
        self._file = None


class Progress:
    """When a rank last moved, and how far it is. Written by every hook, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.step = 0
        self.moved = time.monotonic()

    def beat(self) -> None:
        """Something moved."""
        self.moved = time.monotonic()
