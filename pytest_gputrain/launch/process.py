"""Processes of a launch: dying with the parent, adopting orphans, ending everything that was started.

Linux. Only descendants of the calling process are ever signalled.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


_LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process as soon as ``parent`` ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of every orphan below it.

    So a grandchild that called setsid and was abandoned (a daemon) stays in this process's tree, where it
    can be found, instead of moving to init.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """Every living process below this one."""
    with suppress(psutil.NoSuchProcess):
        return [
            process
            for process in psutil.Process().children(recursive=True)
            if process.status() != psutil.STATUS_ZOMBIE
        ]
    return []


def describe(process: psutil.Process) -> str:
    """``pid 4711: sleep 1000``, at most 120 characters."""
    try:
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        command = "?"
    return f"pid {process.pid}: {command[:100]}"


def kill_descendants(reaped: list[tuple[int, int]], *, within: float = 10.0) -> bool:
    """SIGKILL to everything below this process until nothing is left; False if that took over ``within`` s.

    In a loop, because a process may fork between the listing and the signal; each round stops the whole
    generation before it kills it. The wait statuses of children that ended are appended to ``reaped``.
    """
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        reaped += reap()
        if not has_children():
            return True
        alive = descendants()
        for process in alive:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.002)
    return False


def has_children() -> bool:
    """Whether this process has any child, running or not yet reaped. Orphans it adopted are children too."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def reap() -> list[tuple[int, int]]:
    """``(pid, wait status)`` of every child that has ended since; includes adopted orphans."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def exit_of(status: int) -> tuple[int | None, str | None]:
    """A wait status as (exit code, None) or (None, signal name)."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code, None
    try:
        return None, signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name of its own
        return None, f"signal {-code}"


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read()
        return text[text.rindex(b")") + 2 :][:1] not in (b"Z", b"X")
    return False


class ProcFile:
    """A file of ``/proc`` that is read again and again; opening it takes longer than reading it."""

    def __init__(self, path: str) -> None:
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes | None:
        """What it says now; None when its process is gone, whoever has got the number since."""
        with suppress(OSError):
            return os.pread(self._fd, 1 << 14, 0) if self._fd is not None else None
        return None

    def close(self) -> None:
        """Lets go of the file."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


_STATE = re.compile(rb"\nState:\s(.)")
_PENDING = re.compile(rb"\nSigPnd:\s(\S+)\nShdPnd:\s(\S+)")


def trouble(status: bytes | None) -> str | None:
    """``died`` or ``stopped``, by a process's ``status``: also if it will be, by a signal yet to be taken."""
    state, pending = _STATE.search(status or b""), _PENDING.search(status or b"")
    if state is None or state[1] in b"ZX":
        return "died"
    signals = int(pending[1], 16) | int(pending[2], 16) if pending else 0
    if signals & 1 << signal.SIGKILL - 1:
        return "died"
    return "stopped" if state[1] in b"Tt" or signals & 1 << signal.SIGSTOP - 1 else None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; one without may be ended by it."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/status") as file:
        caught = next((line for line in file if line.startswith("SigCgt:")), "SigCgt: 0")
        return bool(int(caught.split()[1], 16) & 1 << number - 1)
    return False


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """CPU time in seconds of each process together with everything below it; absent when it is gone.

    Children count: a rank that waits for its data-loader workers or a compiler makes progress. In
    nanoseconds from schedstat, since clock ticks can credit an idle process that wakes up often.
    """
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(entry)) is not None:
            alive.add(int(entry))
            children.setdefault(parent, []).append(int(entry))

    def total(pid: int) -> float:
        return _own_seconds(pid) + sum(total(child) for child in children.get(pid, ()))

    return {pid: total(pid) for pid in pids if pid in alive}


def _parent(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    return int(text[text.rindex(b")") + 2 :].split()[1])  # the name before may hold blanks and brackets


def _own_seconds(pid: int) -> float:
    """CPU time of a process's living threads."""
    nanoseconds = 0
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                nanoseconds += int(file.read().split()[0])
    return nanoseconds / 1e9
