"""Runs a user's script or module as ``__main__`` in a rank, as ``python -u script.py`` would.

The process is forked with torch already imported; everything a script can ask about is as in a new process:
``__main__``, ``sys.argv``, ``sys.path``, environment, exit code, error text.
"""

from __future__ import annotations

import builtins
import gc
import importlib.machinery
import io
import os
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from . import rank, recorder
from .records import RankError

# Imported by the fork server for the sake of function ranks. A script must not see them: libraries behave
# differently when they believe they are under pytest.
_NOT_FOR_SCRIPTS = ("pytest", "_pytest", "pluggy", "iniconfig", "xdist", "execnet", "pytest_gputrain.plugin")
# Any of these loads what the phase plan hooks into a rank.
_STUDIED = (
    "GPUTRAIN_STUDY", "GPUTRAIN_MAX_STEPS", "GPUTRAIN_BACKEND", "GPUTRAIN_SEED", "GPUTRAIN_DDP_NO_SYNC"
)  # fmt: skip


def run(
    link: rank.Link,
    command: Sequence[str],
    search_path: Sequence[str],
    tracing: AbstractContextManager[None],
) -> NoReturn:
    """Runs ``[python, -u, [-m,] script, *argv]``, traced, and ends the process.

    A passing rank reports and stays until it is let go; a failing one leaves at once, so that the elastic
    agent sees what it would see of a real process.
    """
    link.hello()
    _forget_pytest()
    arguments = list(command[command.index("-u") + 1 :])
    code, details = _run_to_the_end(link, arguments, search_path, tracing)
    _leave(link, code, details)


def _leave(link: rank.Link, code: int, details: dict[str, Any]) -> NoReturn:
    """Reports and ends the process."""
    for stream in (sys.stdout, sys.stderr, *_open_files()):
        _flush(stream)
    if code == 0 and not details:
        link.report("passed", exit_code=0)
        signal.signal(signal.SIGTERM, _ended_by_torchrun)
        link.wait_for_release()
    else:
        at = time.monotonic()
        if details and RankError(**details["error"]).is_victim:  # the records tell what it needed of whom
            recorder.keep()
        link.report("failed", exit_code=code, **{"at": at, **details})
    os._exit(code)


def _open_files() -> list[Any]:
    """Files that the script has left open: the interpreter would write what is still in their buffers.

    Those that hold no bytes themselves come last: text goes into a buffer below it. What was there before the
    fork is frozen, so this looks at the script's own objects alone.
    """
    found = [each for each in gc.get_objects() if type(each) in (io.TextIOWrapper, io.BufferedWriter)]
    return sorted(found, key=lambda each: type(each) is io.BufferedWriter)


def _ended_by_torchrun(number: int, _frame: object) -> None:
    """Another rank failed: what this one did may tell why."""
    signal.signal(number, signal.SIG_DFL)
    recorder.keep()
    os.kill(os.getpid(), number)


def _study(link: rank.Link, tracing: AbstractContextManager[None]) -> None:
    """What the phase plan asks for by environment variables; imports nothing where it asks for none."""
    if not any(os.environ.get(name) for name in _STUDIED):
        return
    from pytest_gputrain.trace import study

    def leave() -> NoReturn:
        # Not by an exception: on its way out it would run `finally: dist.destroy_process_group()` with the
        # model still alive, which can hang or abort on gloo.
        code, details = 0, dict[str, Any]()
        try:
            tracing.__exit__(None, None, None)
        except Exception as error:  # a switch that found nothing to change
            code, details = _end_of(error)
        _leave(link, code, details)

    study.install(os.environ, leave)


def _flush(stream: Any) -> None:
    """Flushes a stream that the script may have closed or replaced."""
    try:
        stream.flush()
    except Exception:  # anything may stand in for stdout
        return


def _run_to_the_end(
    link: rank.Link,
    arguments: list[str],
    search_path: Sequence[str],
    tracing: AbstractContextManager[None],
) -> tuple[int, dict[str, Any]]:
    """(exit code, details of the failure): the script, then what the interpreter does after it."""
    code = 0
    details: dict[str, Any] = {}
    try:
        with tracing:
            _study(link, tracing)
            _execute(arguments, search_path)
    except BaseException as error:  # SystemExit and KeyboardInterrupt end scripts too
        code, details = _end_of(error)
    _end_thread_pools()
    for thread in threading.enumerate():  # as the interpreter does before it exits
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    _run_exit_handlers()
    return code, details


def _end_thread_pools() -> None:
    """As the interpreter does before it waits for threads: idle workers of a pool end only when told to."""
    for callback in reversed(getattr(threading, "_threading_atexits", ())):
        try:
            callback()
        except Exception:
            traceback.print_exc()


def _execute(arguments: list[str], search_path: Sequence[str]) -> None:
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path[:] = [os.getcwd(), *search_path]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(arguments[0])
    sys.argv[:] = arguments
    sys.path[:] = [os.path.dirname(os.path.realpath(path)), *search_path]
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main.__spec__ = None
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def _end_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """What an uncaught exception makes of a script: its exit code, printed text and report."""
    if isinstance(error, SystemExit):
        if error.code is None or error.code == 0:
            return 0, {}
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
            return 1, rank.describe(error)[1]
        return error.code & 0xFF, rank.describe(error)[1]
    tb = rank.skip_machinery(error.__traceback__)
    try:
        # torch's own hook (it prefixes "[rank0]:") looks at the exception and not at its third argument.
        sys.excepthook(type(error), error.with_traceback(tb), tb)
    except Exception:  # a hook of the script's
        traceback.print_exc()
    details = rank.describe(error)[1]
    return (130 if isinstance(error, KeyboardInterrupt) else 1), details


def _run_exit_handlers() -> None:
    import atexit

    run_all = getattr(atexit, "_run_exitfuncs", None)
    if run_all is not None:
        try:
            run_all()
        except BaseException:  # as at interpreter exit: printed, exit code unchanged
            traceback.print_exc()


def _forget_pytest() -> None:
    for name in list(sys.modules):
        if name.startswith(_NOT_FOR_SCRIPTS) and name.partition(".")[0] != "pytest_gputrain":
            del sys.modules[name]
