"""What a function may leave behind in a rank that is to be used again, and how that is noticed.

A ``Probe`` reads one piece of state. Once the rank is ready its values are taken; after each call they are
read again, and whatever differs is dirt: a line for people. What changes by right from call to call
(environment, working directory) is read again as each call begins. The probes are
in ``dirt_python`` and ``dirt_torch``.

Not seen: the state of modules that the function imported or changed; C code that changes things behind
Python's back; files.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterable, Mapping

Probe = Callable[[], object]

MORE_FILES = 32
"""Open files that ranks may gain over their life: connections and libraries open some."""
MORE_MEMORY = 1 << 30
"""Bytes that a rank may gain over its life: allocators keep what a large test has freed."""
RUNNING = ("threads", "child processes")
"""Probes of what goes on by itself."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Baseline:
    """How a rank is when it is clean."""

    def __init__(self, fixed: Mapping[str, Probe], by_call: Mapping[str, Probe]) -> None:
        self._by_call = dict(by_call)
        self._probes = {**fixed, **by_call}
        self._values: dict[str, object] = {}
        for name, probe in self._probes.items():
            with contextlib.suppress(Exception):  # this torch or this kernel does not know it
                self._values[name] = probe()
        self._files, self._memory = open_files(), resident()

    def begin(self) -> None:
        """Takes what is this call's own."""
        for name, probe in self._by_call.items():
            self._values[name] = probe()

    def left_running(self) -> list[str]:
        """A line for each thing that goes on by itself, and so must be known before the call is over."""
        return self._differences(name for name in RUNNING if name in self._values)

    def dirt(self) -> list[str]:
        """A line for each other thing that is not as it was."""
        return self._differences(name for name in self._values if name not in RUNNING) + self._growth()

    def _differences(self, names: Iterable[str]) -> list[str]:
        found = []
        for name in names:
            before = self._values[name]
            try:
                after = self._probes[name]()
                if after is not before and after != before:
                    found.append(f"{name}: {changed(before, after)}")
            except Exception as error:  # whatever stops it from being read was left behind too
                found.append(f"{name} cannot be read any more: {type(error).__name__}: {error}"[:300])
        return found

    def _growth(self) -> list[str]:
        found = []
        if (files := open_files()) > self._files + MORE_FILES:
            found.append(f"open files: grew from {self._files} to {files}")
        most = self._memory + MORE_MEMORY
        # The peak can be had ten times as fast, and what never was is not there.
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > most and (memory := resident()) > most:
            found.append(f"memory: grew from {self._memory >> 20} to {memory >> 20} MiB")
        return found


def changed(before: object, after: object) -> str:
    """The difference in a few words."""
    if isinstance(before, dict) and isinstance(after, dict):
        words = [f"{_text(key)} left" for key in after.keys() - before.keys()]
        words += [f"{_text(key)} gone" for key in before.keys() - after.keys()]
        words += [
            f"{_text(key)} changed" for key in before.keys() & after.keys() if before[key] != after[key]
        ]
        return ", ".join(sorted(words)[:5])
    if isinstance(before, list) and isinstance(after, list):
        return f"changed ({len(before)} entries became {len(after)})"
    return f"{before!s:.60} became {after!s:.60}"


def _text(key: object) -> str:
    return os.fsdecode(key) if isinstance(key, bytes) else str(key)


def open_files() -> int:
    """How many descriptors this process has open."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))  # the size: from Linux 6.2 on


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
