"""How far a run is, read from what its first rank writes: one line in place on a terminal, else one a minute.

Runs in the process that launched, so that it costs the ranks nothing. Imports no torch.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pytest_gputrain.endurance.records import StepRecord, record_of
from pytest_gputrain.values import format_size

LOOK_SECONDS, LINE_SECONDS = 0.5, 60.0
WIDTH = 100


@dataclass(frozen=True)
class Screen:
    """Where progress goes. in_place: a terminal, whose line can be written over."""

    write: Callable[[str], None]
    in_place: bool


# Set by the command line and by pytest's session; where nothing is set, nothing is said.
SCREEN: ContextVar[Screen | None] = ContextVar("gputrain_progress", default=None)

# What an interrupted run has to say: for the last lines, which the command line and pytest's session write.
LAST_WORDS: list[str] = []


def last_words() -> list[str]:
    """Once."""
    said = [*LAST_WORDS]
    LAST_WORDS.clear()
    return said


def line_of(name: str, record: StepRecord, total: int | None, world_size: int, pace: float) -> str:
    """``gpt-cpu: step 120/1000, loss 3.214, 5,120 tokens/s, 312.0 MiB, 41 s left``. pace: seconds a step."""
    of = f"/{total}" if total else ""
    parts = [f"step {record.step}{of}", "no loss" if record.loss is None else f"loss {record.loss:.4g}"]
    if pace > 0:
        parts.append(f"{record.tokens * world_size / pace:,.0f} tokens/s")
    parts.append(format_size(record.allocated_bytes or record.rss_bytes))
    if total and pace > 0:
        parts.append(f"{_duration((total - record.step) * pace)} left")
    return f"{name}: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def shown(path: Path, name: str, total: int | None, world_size: int) -> Iterator[None]:
    """While the body runs, say how far the records at ``path`` have come."""
    screen = SCREEN.get()
    if screen is None:
        yield
        return
    stop = threading.Event()
    watch = _Watch(path, name, total, world_size, screen)
    thread = threading.Thread(target=watch.until, args=(stop,), daemon=True, name="gputrain-progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Watch:
    def __init__(self, path: Path, name: str, total: int | None, world_size: int, screen: Screen) -> None:
        self.path, self.name, self.total, self.world_size, self.screen = path, name, total, world_size, screen
        self.offset, self.first, self.last = 0, None, None  # type: int, StepRecord | None, StepRecord | None
        self.said = time.monotonic()

    def until(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            if self._look() and (self.screen.in_place or time.monotonic() - self.said >= LINE_SECONDS):
                self._say()
        if self.screen.in_place and self.last is not None:
            self.screen.write("\r" + " " * WIDTH + "\r")

    def _look(self) -> bool:
        """Whether there is a new record."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:
            return False
        whole = new[: new.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        if not lines:
            return False
        self.offset += len(whole)
        with contextlib.suppress(ValueError):
            self.first = self.first or record_of(lines[0])
            self.last = record_of(lines[-1])
        return self.last is not None

    def _say(self) -> None:
        assert self.first is not None
        assert self.last is not None
        steps = self.last.step - self.first.step
        pace = (self.last.wall - self.first.wall) / steps if steps else self.last.seconds
        line = line_of(self.name, self.last, self.total, self.world_size, pace)
        self.screen.write(f"\r{line[:WIDTH]:{WIDTH}}" if self.screen.in_place else f"{line}\n")
        self.said = time.monotonic()
