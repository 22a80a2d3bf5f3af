"""What a function may leave behind in the process and the interpreter: the probes of ``dirt`` for these."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the C code behind signal, as old as that
import decimal
import gc
import locale
import os
import resource
import signal
import sys
import threading
import time
import warnings

from . import process, stacks
from .dirt import Probe
from .dirt_quick import Glance, Loggers

_LAST_STEPS = 1.0
"""Seconds for threads that were told to end and not waited for: a queue's feeder, a pool's workers."""
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_LIMITS = {
    name: getattr(resource, name) for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_DATA")
}


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
