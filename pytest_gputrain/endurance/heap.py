"""Bytes that malloc has given out and not got back: host memory to the byte, in a twentieth of a millisecond.

On the CPU a tensor's storage is malloc's, so that memory which does not grow here cannot hold more and more
tensors, and the live ones need not be counted. Not seen: Python's small objects, which have an allocator of
their own. Known to glibc from 2.33 on, as long as no other allocator is preloaded.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


class HeapMeter:
    """``heap_bytes`` of each step, or of every 2nd, 4th, … where the answer takes too much of the step.

    malloc goes through all that is free, which may become more and more. limit: steps the run has at most, of
    which enough are measured. last: the last answer.
    """

    _SHARE, _IN_A_ROW = 0.0005, 3  # of a step's time; answers that took more
    _MOST_BETWEEN, _FEWEST = 16, 128

    def __init__(self, limit: int) -> None:
        self.last: int | None = None
        self._most = min(self._MOST_BETWEEN, limit // self._FEWEST)
        self._every, self._dear = 1, 0

    def read(self, step: int, seconds: float) -> int | None:
        """After a step that took so many seconds; None where it is not this one's turn, or nobody tells."""
        if step % self._every:
            return None
        began = time.perf_counter()
        self.last = heap_bytes()
        took = (time.perf_counter() - began) / self._every
        self._dear = self._dear + 1 if took > self._SHARE * seconds else 0
        if self._dear == self._IN_A_ROW and 2 * self._every <= self._most:
            self._every, self._dear = 2 * self._every, 0
        return self.last


def heap_bytes() -> int | None:
    """Bytes in use, of all arenas and of blocks with a mapping of their own; None where nobody tells."""
    if (ask := _mallinfo2()) is None:
        return None
    told = ask()
    in_use: int = told.uordblks + told.hblkhd
    return in_use


@functools.cache
def _mallinfo2() -> Callable[[], Any] | None:
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):  # another C library, or an older one
        return None
    ask.restype, ask.argtypes = _Mallinfo2, []
    # Under a preloaded allocator glibc's own arenas are empty.
    return ask if ask().uordblks else None
