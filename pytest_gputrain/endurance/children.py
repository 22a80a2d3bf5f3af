"""What a rank has started: the processes that descend from it and what each holds, read from /proc.

A process's own memory is what is resident and shared with no file. A forked worker begins with its parent's,
and pages that cease to be shared with the parent are no growth of it. Linux; elsewhere nothing is told.
Imports no torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

EVERY = 20  # steps between two looks for new processes: all of the machine's are listed
_SAMPLES = 60  # of one process in a run; growth can be told from 27 on
_MOST = 32  # processes that are read
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_NAME_LENGTH = 80
DATA_WORKER = "a data loader's worker"
FORKED = "a process forked by the rank"
# What torch calls it (torch/utils/data/_utils/worker.py).
_COMM_OF_WORKER = "pt_data_worker"


class Children:
    """All that descend from this process. limit: steps that the run has at most."""

    def __init__(self, limit: int, proc: Path = Path("/proc")) -> None:
        self._proc, self._own = str(proc), os.getpid()
        self._every = min(EVERY, max(1, limit // _SAMPLES))
        self._names: dict[int, str] = {}
        self._others: set[int] = set()
        self._queued: dict[int, float] = {}

    def look(self, step: int) -> dict[str, Any]:
        """Before a step: fields of its record, in most steps none."""
        if step % EVERY == 0:
            with suppress(OSError):
                self._find()
        elif not self._names or step % self._every:
            return {}
        read = [one for pid in self._first() if (one := self._read(pid))]
        waited = {"children_queued": self._waited()} if read else {}
        return {"num_children": len(self._names), "children": read, **waited}

    def _waited(self) -> float:
        """Seconds since the look before, for which they were ready to run while others ran."""
        before, self._queued = self._queued, {pid: self._queue(pid) for pid in self._first()}
        return sum(max(0.0, now - before[pid]) for pid, now in self._queued.items() if pid in before)

    def _first(self) -> list[int]:
        return sorted(self._names)[:_MOST]

    def _queue(self, pid: int) -> float:
        """Of its whole life, in seconds; 0 where the kernel does not tell (see ``stable_clock.Clock``)."""
        with suppress(OSError, ValueError, IndexError), open(f"{self._proc}/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
        return 0.0

    def _find(self) -> None:
        """Learn the processes that are new; a number that is another's now is not looked at again."""
        listed = {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        self._others &= listed
        self._names = {pid: name for pid, name in self._names.items() if pid in listed}
        parents = {pid: self._parent(pid) for pid in listed - self._others - self._names.keys()}
        for pid in parents:
            if self._is_ours(pid, parents):
                self._names[pid] = self._name(pid)
            else:
                self._others.add(pid)

    def _is_ours(self, pid: int, parents: dict[int, int]) -> bool:
        climbed: set[int] = set()
        while pid in parents and pid != self._own and pid not in climbed:
            climbed.add(pid)
            pid = parents[pid]
        return bool(climbed) and (pid == self._own or pid in self._names)

    def _parent(self, pid: int) -> int:
        """0 where it is gone or another's."""
        with suppress(OSError, ValueError, IndexError), open(f"{self._proc}/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split(None, 2)[1])
        return 0

    def _name(self, pid: int) -> str:
        with suppress(OSError):
            if self._text(pid, "comm").strip() == _COMM_OF_WORKER:
                return DATA_WORKER
            command = self._text(pid, "cmdline")
            if command and command == self._text(self._own, "cmdline"):
                return FORKED
            return (
                " ".join(command.replace("\0", " ").split())[:_NAME_LENGTH] or self._text(pid, "comm").strip()
            )
        return FORKED

    def _text(self, pid: int, name: str) -> str:
        with open(f"{self._proc}/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(4096)

    def _read(self, pid: int) -> dict[str, Any] | None:
        """pid, name, bytes, fds; None, and forgotten, where it has ended and been waited for."""
        try:
            with open(f"{self._proc}/{pid}/statm", "rb") as file:
                _, resident, shared, *_ = map(int, file.read().split())
        except (OSError, ValueError):
            self._names.pop(pid, None)
            return None
        fds = 0
        with suppress(OSError):  # one that has ended, or runs as somebody else
            fds = len(os.listdir(f"{self._proc}/{pid}/fd"))
        return {"pid": pid, "name": self._names[pid], "bytes": (resident - shared) * _PAGE, "fds": fds}
