"""A rank's own time in a stability run: without that in which others had the processor, or were waited for.

Ranks wait for each other within a step, too: where DistributedDataParallel sends buffers before a forward, in
SyncBatchNorm, in a loop's own collectives. A slow rank would make all of them slow.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_SCHEDSTAT = "/proc/thread-self/schedstat"


class Moment(NamedTuple):
    """Seconds on a clock, and those until then for which others ran, or other ranks were waited for.

    ran: seconds for which the thread itself ran.
    """

    at: float = 0.0
    queued: float = 0.0
    waited: float = 0.0
    ran: float = 0.0

    def own_since(self, earlier: Moment) -> float:
        """The rank's own seconds between two moments."""
        elsewhere = self.queued - earlier.queued + self.waited - earlier.waited
        return max(0.0, self.at - earlier.at - elsewhere)


class Clock:
    """Of the thread that makes it. cpu_seconds: for which it ran. waited: for other ranks, so far.

    Linux tells for how long a thread was ready to run and others ran, in nanoseconds
    (Documentation/scheduler/sched-stats.rst); elsewhere it is 0.
    """

    def __init__(self) -> None:
        self.cpu_seconds = self.waited = 0.0
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)

    def now(self) -> Moment:
        if self._file is None:
            self.cpu_seconds = time.thread_time()
            return Moment(time.perf_counter(), 0.0, self.waited, self.cpu_seconds)
        ran, queued, _ = os.pread(self._file, 80, 0).split()
        self.cpu_seconds = int(ran) / 1e9
        return Moment(time.perf_counter(), int(queued) / 1e9, self.waited, self.cpu_seconds)

    def glance(self, last: Moment) -> Moment:
        """Now, with the queue as it was at ``last``: to ask for it takes a hundredth of a millisecond."""
        return Moment(time.perf_counter(), last.queued, self.waited)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Waits:
    """Context manager: while it is open, what this thread waits for in torch's collectives is counted.

    Seen are handles on which Python waits, as every synchronous collective does, the sending of DDP's
    buffers, and its wait for gradients: at the end of a backward, of which a step may have several, as long
    as the thread neither runs nor could. Not what else C++ waits for, as functional collectives do.
    """

    def __init__(self, clock: Clock, arrivals: Arrivals) -> None:
        self._clock, self._thread, self._arrivals = clock, threading.get_ident(), arrivals
        self._inside = self._in_backward = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Waits:
        import torch
        import torch.distributed as dist

        self._replace(torch.autograd, "_engine_run_backward", self._backward)
        if dist.is_available():
            for owner, name in ((dist.distributed_c10d.Work, "wait"), (dist, "_broadcast_coalesced")):
                self._replace(owner, name, self._timed)
        return self

    def _replace(self, owner: Any, name: str, wrapped: Callable[[Callable[..., Any]], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, wrapped(original))
        self._stack.callback(setattr, owner, name, original)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*args: Any, **kwargs: Any) -> Any:
            if self._inside or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._inside, begun = True, self._clock.now()
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False
                self._clock.waited += self._clock.now().own_since(begun)

        return _unseen(waits)

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            if self._in_backward or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._in_backward = True
            self._arrivals.begin_backward()
            try:
                return original(*args, **kwargs)
            finally:
                self._in_backward = False
                if (since := self._arrivals.end_backward()) is not None:
                    now = self._clock.now()
                    self._clock.waited += max(0.0, now.own_since(since) - (now.ran - since.ran))

        return _unseen(backward)


def _unseen(function: Any) -> Callable[..., Any]:
    """It is on the stack of a rank that waits, and neither the user's code nor a check's: else the rank would
    be taken for one that is busy (launch/stacks.py).
    """
    function.__code__ = function.__code__.replace(co_filename="<string>")
    unseen: Callable[..., Any] = function
    return unseen


class Arrivals:
    """When a step's last gradient was there: from then on ranks wait for each other.

    In the first steps every parameter is looked at, later those that came last in a backward, in every step
    the same.
    """

    _LEARNS = 3

    def __init__(self, clock: Clock) -> None:
        self.last: Moment | None = None
        self._clock, self._steps = clock, 0
        self._handles: dict[int, Any] = {}
        self._came_last: int | None = None
        self._ends: set[int] = set()
        self._of_backward: Moment | None = None

    def begin_backward(self) -> None:
        self._of_backward = None

    def end_backward(self) -> Moment | None:
        """When the last gradient of this backward came, None where none did."""
        if self._of_backward is not None and self._came_last is not None:
            self._ends.add(self._came_last)
        return self._of_backward

    def look_at(self, parameters: Sequence[Any]) -> None:
        for one in parameters:
            if one.is_leaf and one.requires_grad:
                self._handles[id(one)] = one.register_post_accumulate_grad_hook(self._came)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def learn(self) -> None:
        """After a step: drop the hooks that are not needed any more."""
        self._steps += 1
        if self._steps == self._LEARNS and self._came_last is not None:
            for key in self._handles.keys() - self._ends - {self._came_last}:
                self._handles.pop(key).remove()

    def _came(self, parameter: Any) -> None:
        self.last = self._of_backward = self._clock.now()
        self._came_last = id(parameter)
