"""What a function may leave behind in a rank that is to be used again, and how that is noticed.

A ``Probe`` reads one piece of state. Once the rank is ready its values are taken; after each call they are
read again, and whatever differs is dirt: a line for people. What changes by right from call to call
(environment, working directory) is read again as each call begins. The probes of torch are in
``dirt_torch``.

Not seen: the state of modules that the function imported or changed; C code that changes things behind
Python's back; files.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the C code behind signal, as old as that
import builtins
import contextlib
import decimal
import gc
import locale
import logging
import operator
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from . import process, stacks

Probe = Callable[[], object]

MORE_FILES = 32
"""Open files that ranks may gain over their life: connections and libraries open some."""
MORE_MEMORY = 1 << 30
"""Bytes that a rank may gain over its life: allocators keep what a large test has freed."""
RUNNING = ("threads", "child processes")
"""Probes of what goes on by itself."""
_LAST_STEPS = 1.0
"""Seconds for threads that were told to end and not waited for: a queue's feeder, a pool's workers."""
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


class Glance:
    """A probe that costs time, behind a look that costs none: it is read again only when the look differs."""

    def __init__(self, look: Probe, probe: Probe) -> None:
        self._look, self._probe = look, probe
        self._seen, self._value = look(), probe()

    def __call__(self) -> object:
        """The probe's value."""
        if (now := self._look()) != self._seen:
            self._value = self._probe()
            self._seen = now
        return self._value


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


def by_call() -> dict[str, Probe]:
    """State that each call has its own of."""
    return {
        "environment": _environment,
        "working directory": os.getcwd,
        "sys.path": lambda: list(sys.path),
        "sys.argv": lambda: list(sys.argv),
    }


def _environment() -> object:
    """The variables, as they are behind ``os.environ``: a fraction of the time that decoding them takes."""
    return dict(getattr(os.environ, "_data", os.environ))


def python() -> dict[str, Probe]:
    """State of the process and of the interpreter."""
    return {
        "threads": _threads_once_ended(),
        "child processes": process.has_children,
        "signal handlers": Glance(_handlers_in_c, _signal_handlers),
        "signal mask": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "timers": lambda: [signal.getitimer(which)[0] > 0 for which in _TIMERS],
        "umask": _umask,
        "resource limits": lambda: {name: resource.getrlimit(which) for name, which in _LIMITS.items()},
        "priority": lambda: (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)),
        "standard streams": _streams,
        "interpreter hooks": _hooks,
        "interpreter limits": lambda: (sys.getrecursionlimit(), sys.getswitchinterval()),
        "garbage collector": lambda: (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "import hooks": Glance(lambda: [*sys.meta_path, *sys.path_hooks], _import_hooks),
        "warnings filters": lambda: list(warnings.filters),
        "logging": Loggers(),
        "locale": lambda: locale.setlocale(locale.LC_ALL),
        "decimal context": lambda: repr(decimal.getcontext()),
    }


def _import_hooks() -> dict[str, int]:
    """Finders and path hooks by name, but for those that an installed library brings with its import."""
    hooks = [*sys.meta_path, *sys.path_hooks]
    return {_name(hook): id(hook) for hook in hooks if not _of_a_library(hook)}


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _of_a_library(hook: object) -> bool:
    module = sys.modules.get(getattr(hook, "__module__", None) or "")
    return stacks.is_installed(getattr(module, "__file__", None) or "")


_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_LIMITS = {
    name: getattr(resource, name) for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_DATA")
}


def _threads_once_ended() -> Probe:
    usual = len(_threads())

    def threads() -> dict[str, int]:
        limit = time.monotonic() + _LAST_STEPS
        while len(found := _threads()) > usual and time.monotonic() < limit:
            time.sleep(0.001)
        return found

    return threads


def _threads() -> dict[str, int]:
    # Dummies stand for threads of C code that came through Python once, such as autograd's.
    return {
        f"{thread.name} ({thread.ident})": 1
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread)
    }


def _handlers_in_c() -> object:
    """What ``signal.getsignal`` makes enumerations of."""
    return list(map(_signal.getsignal, range(1, signal.NSIG)))


def _signal_handlers() -> dict[str, object]:
    return {number.name: _handler(number) for number in signal.Signals}


def _handler(number: signal.Signals) -> object:
    handler = signal.getsignal(number)
    # The first data loader with workers installs one for good, which minds its own workers alone.
    by_a_loader = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    return signal.SIG_DFL if by_a_loader else handler


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _streams() -> dict[str, object]:
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    return {f"sys.{name}": (id(stream), stream.closed) for name, stream in streams.items()}


def _hooks() -> dict[str, object]:
    return {
        "sys.excepthook": sys.excepthook,
        "sys.displayhook": sys.displayhook,
        "sys.unraisablehook": sys.unraisablehook,
        "threading.excepthook": threading.excepthook,
        "sys.settrace": sys.gettrace(),
        "sys.setprofile": sys.getprofile(),
        "threading.settrace": threading.gettrace(),
        "threading.setprofile": threading.getprofile(),
    }


class Loggers:
    """The root logger and those that are there, to see that none was set up anew. What comes new is fine."""

    _read = tuple(map(operator.attrgetter, ("level", "disabled", "propagate", "handlers")))

    def __init__(self) -> None:
        there = logging.root.manager.loggerDict.values()
        self._loggers = [logging.root, *(each for each in there if isinstance(each, logging.Logger))]
        self._clean: dict[str, object] = dict.fromkeys((each.name for each in self._loggers), "as it was")
        self._clean["disable"] = logging.root.manager.disable
        *plain, handlers = self._now()
        self._values = [*plain, list(map(list, handlers))]

    def _now(self) -> list[list[Any]]:
        return [list(map(read, self._loggers)) for read in self._read]  # hundreds, after every call: in C

    def __call__(self) -> dict[str, object]:
        """Each by name, and whether logging is off as a whole."""
        now, disable = self._now(), logging.root.manager.disable
        if now == self._values and disable == self._clean["disable"]:
            return self._clean
        trios = zip(self._loggers, zip(*now, strict=True), zip(*self._values, strict=True), strict=True)
        different = {logger.name: after for logger, after, before in trios if after != before}
        return {**self._clean, "disable": disable, **different}


def _may_be_replaced(name: str, value: object) -> bool:
    return callable(value) and (not name.startswith("_") or name in ("__init__", "__call__"))


class Attributes:
    """Public functions and classes of some modules, to see that none was replaced. What comes new is fine."""

    def __init__(self, *namespaces: type | ModuleType) -> None:
        self._known = []
        for space in namespaces:
            known = {name: value for name, value in vars(space).items() if _may_be_replaced(name, value)}
            self._known.append((space, known, _contents(space)))

    def __call__(self) -> dict[str, str]:
        """The replaced ones, by name; none when clean."""
        found: dict[str, str] = {}
        for number, (space, known, contents) in enumerate(self._known):
            now = _contents(space)
            with contextlib.suppress(Exception):  # a value that cannot be compared is a new one
                if now == contents:  # thousands, after every call: in C
                    continue
            there = vars(space)
            replaced = [name for name, value in known.items() if there.get(name) is not value]
            found.update({f"{space.__name__}.{name}": "" for name in replaced})
            if not replaced:
                self._known[number] = (space, known, now)
        return found


def _contents(space: type | ModuleType) -> list[object]:
    """What a namespace holds, quick to compare: what is the same object is not asked whether it is equal."""
    return list(vars(space).values())


STANDARD = (builtins, os, time, random, warnings)
"""Modules whose functions tests like to replace."""
