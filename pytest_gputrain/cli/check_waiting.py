"""What ``gputrain check`` is at, on a terminal: one line in place, for checks that take minutes.

On stderr and gone before anything else is written, so that the table stays what it is.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from pytest_gputrain.endurance.progress import SCREEN, WIDTH, Screen

SOON, EVERY = 2.0, 1.0  # seconds: what is over by then needs no word
TELLS_ITSELF = ("stable_training",)  # its own line says more


class Waiting:
    """``at("gpt compile_parity")`` begins a line, ``over()`` takes it away; nothing is written elsewhere."""

    def __init__(self, screen: Screen | None) -> None:
        self._screen = screen if screen is not None and screen.in_place else None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._what, self._since, self._shown = "", 0.0, False
        if self._screen is not None:
            threading.Thread(target=self._tell, daemon=True, name="gputrain-waiting").start()

    def at(self, what: str) -> None:
        with self._lock:
            self._clear()
            self._what, self._since = what, time.monotonic()

    def over(self) -> None:
        with self._lock:
            self._clear()
            self._what = ""

    def close(self) -> None:
        self._stop.set()
        self.over()

    def _tell(self) -> None:
        while not self._stop.wait(EVERY):
            with self._lock:
                seconds = time.monotonic() - self._since
                if self._what and seconds >= SOON and self._screen is not None:
                    self._screen.write(f"\r{f'{self._what}: {seconds:.0f} s':{WIDTH}.{WIDTH}}")
                    self._shown = True

    def _clear(self) -> None:
        if self._shown and self._screen is not None:
            self._screen.write("\r" + " " * WIDTH + "\r")
        self._shown = False


@contextlib.contextmanager
def waiting() -> Iterator[Waiting]:
    """On the command line's screen."""
    line = Waiting(SCREEN.get())
    try:
        yield line
    finally:
        line.close()
