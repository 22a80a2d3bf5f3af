"""Writes a rank's stacks when nothing in it has moved for a while, and whenever SIGUSR1 asks for them.

A thread, for the text that people want; behind it faulthandler's own timer and signal handler, written in C,
for a rank whose main thread holds the interpreter's lock for ever. A stack dump is no verdict: that is the
launch's to give.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pytest_gputrain.trace import stackdumps
from pytest_gputrain.trace.lines import PENDING_STACKS
from pytest_gputrain.trace.sink import Progress

MOST_DUMPS = 10
"""Of one rank: one for each time it stood still, or was asked."""
_STOP_SECONDS = 2.0
_LATER = ("dump_traceback_later", "cancel_dump_traceback_later")


class Watchdog:
    """Watches ``progress``. ``traces`` says what the rank has done so far.

    on_dump: called with the file's name after a dump for standing still.
    """

    def __init__(
        self, folder: Path, rank: int, seconds: float, progress: Progress, traces: Callable[[], str],
        on_dump: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._rank, self._seconds = folder, rank, seconds
        self._progress, self._traces, self._on_dump = progress, traces, on_dump
        self._stopped = threading.Event()
        self._file: Any = None
        self._answered = float("-inf")
        self._dumps = 0
        self._timer_taken = False
        self._later: tuple[Any, ...] = ()
        self._collectives: str | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watches meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._run, name="gputrain-watchdog", daemon=True)
        with open(self._folder / PENDING_STACKS, "a") as self._file, self._shared_timer(), self._signal():
            self._rearm()
            thread.start()
            try:
                yield
            finally:
                self._stopped.set()
                thread.join(_STOP_SECONDS)
        stackdumps.settle(self._folder, self._rank)

    def _run(self) -> None:
        pid, poll = os.getpid(), min(1.0, self._seconds / 4)
        while not self._stopped.wait(poll) and os.getpid() == pid:
            self._rearm()
            with contextlib.suppress(Exception):  # a full disk must not end the watching
                self._look()

    def _look(self) -> None:
        quiet_since = self._progress.moved
        quiet = time.monotonic() - quiet_since
        if os.fstat(self._file.fileno()).st_size:
            self._dump("on demand (SIGUSR1), or the interpreter was held", self._take_pending())
        elif quiet > self._seconds / 2 and self._collectives_moved():
            self._progress.beat()
        elif quiet > self._seconds and quiet_since != self._answered:
            self._answered = quiet_since
            path = self._dump(f"nothing moved for {quiet:.1f} s", "")
            if path is not None and self._on_dump is not None:
                self._on_dump(path.name)

    def _dump(self, why: str, pending: str) -> Path | None:
        if self._dumps >= MOST_DUMPS:
            return None
        self._dumps += 1
        # py-spy computes for seconds, which the launch would take for movement: only for who asked.
        native = stackdumps.native_stacks() if pending else ""
        parts = [
            f"rank {self._rank}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {why}\n",
            f"--- traces\n{self._traces()}",
            f"--- stacks\n{stackdumps.python_stacks()}",
            f"--- stacks by faulthandler, as it was asked\n{pending}" if pending else "",
            f"--- native stacks (py-spy)\n{native}" if native else "",
        ]
        return stackdumps.write(self._folder, self._rank, "\n".join(part for part in parts if part))

    def _take_pending(self) -> str:
        time.sleep(0.05)  # faulthandler writes in pieces
        path = self._folder / PENDING_STACKS
        text = path.read_text(errors="replace")
        os.truncate(path, 0)
        return text

    def _collectives_moved(self) -> bool:
        """Whether torch's flight recorder has gone on since the last look, where it is on."""
        with contextlib.suppress(Exception):
            from torch._C import _distributed_c10d

            seen = str(_distributed_c10d._dump_fr_trace_json(False, False))  # type: ignore[attr-defined]
            before, self._collectives = self._collectives, seen
            return before is not None and before != seen
        return False

    # -- what works without Python --------------------------------------------------------------------

    def _rearm(self) -> None:
        """As long as this thread runs, the timer never fires; later than this thread would answer."""
        if not self._timer_taken:
            self._later[0](1.5 * self._seconds + 1.0, repeat=False, file=self._file)

    @contextlib.contextmanager
    def _shared_timer(self) -> Iterator[None]:
        """faulthandler has one timer a process: a script that uses it has it for itself from then on."""
        self._later = tuple(getattr(faulthandler, name) for name in _LATER)

        def taking(original: Any) -> Any:
            def function(*args: Any, **kwargs: Any) -> Any:
                self._timer_taken = True
                return original(*args, **kwargs)

            return function

        for name, original in zip(_LATER, self._later, strict=True):
            setattr(faulthandler, name, taking(original))
        try:
            yield
        finally:
            for name, original in zip(_LATER, self._later, strict=True):
                setattr(faulthandler, name, original)
            if not self._timer_taken:
                self._later[1]()

    @contextlib.contextmanager
    def _signal(self) -> Iterator[None]:
        """Answers SIGUSR1 unless it is taken, below Python, so that a script finds it free and takes it."""
        ours = signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        if ours:
            faulthandler.register(signal.SIGUSR1, self._file, all_threads=True, chain=False)
        try:
            yield
        finally:
            if ours and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
                faulthandler.unregister(signal.SIGUSR1)
