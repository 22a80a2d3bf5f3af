"""What ``gputrain find-batch`` shows while it works: a line a probe, and on a terminal what runs just now.

The work is done in another process (``find_batch_rank``), which appends an event a line to a file, as JSON;
a thread here reads on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pytest_gputrain.values import format_size

POLL = 0.1
WIDTHS = (">6", ">13", ">9", ">8")
HEAD = ("batch", "peak", "of limit", "seconds")
CLEAR = "\r\x1b[K"


class Progress:
    """Shows the events of a file as they come, while it is open as a context."""

    def __init__(self, path: Path, stream: TextIO, title: str) -> None:
        self._path = path
        self._table = Table(stream, title)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._path.touch()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def last_size(self) -> int | None:
        """The batch size of the last probe that ended."""
        return self._table.last_size

    def _follow(self) -> None:
        with self._path.open(encoding="utf-8") as file:
            rest = ""
            while True:
                ended = self._ended.is_set()  # before reading: what came until then is still shown
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    self._table.show(json.loads(line))
                if ended:
                    self._table.close()
                    return
                self._table.tick()
                self._ended.wait(POLL)


class Table:
    """Lines for a log; on a terminal also a last line that is written over. The title comes with the first
    event: before, the case may turn out to be bad input.
    """

    def __init__(self, stream: TextIO, title: str = "") -> None:
        self._stream, self._title = stream, title
        self._moves = is_terminal(stream)
        self._doing, self._since = "starting", time.monotonic()
        self._limit: int | None = None
        self._headed, self._drawn = False, ""
        self.last_size: int | None = None

    def show(self, event: Mapping[str, Any]) -> None:
        """One event: ``{"doing": …, "limit": …}`` or ``{"size": …, "peak": …, "seconds": …}``."""
        if self._title:
            self._erase()
            print(self._title, file=self._stream, flush=True)
            self._title = ""
        if "doing" in event:
            self._doing, self._limit = event["doing"], event.get("limit", self._limit)
        else:
            self._row(event)
        self._since = time.monotonic()

    def _row(self, event: Mapping[str, Any]) -> None:
        self._erase()
        if not self._headed:
            self._headed = True
            self._line(HEAD)
        size, peak = event["size"], event["peak"]
        self.last_size = size
        part = f"{peak / self._limit:.0%}" if peak is not None and self._limit else ""
        told = "out of memory" if peak is None else format_size(int(peak))
        self._line((str(size), told, part, f"{event['seconds']:.1f}"))

    def _line(self, cells: tuple[str, ...]) -> None:
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        print(text.rstrip(), file=self._stream, flush=True)

    def tick(self) -> None:
        """Say what runs just now, and for how long it has."""
        if self._moves:
            text = f"{CLEAR}  {self._doing}, {time.monotonic() - self._since:.0f} s"
            if text != self._drawn:
                print(text, end="", file=self._stream, flush=True)
                self._drawn = text

    def close(self) -> None:
        self._erase()

    def _erase(self) -> None:
        if self._drawn:
            print(CLEAR, end="", file=self._stream, flush=True)
            self._drawn = ""


def is_terminal(stream: TextIO) -> bool:
    """Whether a line may be written over: not in CI, whose logs keep every version of it."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
