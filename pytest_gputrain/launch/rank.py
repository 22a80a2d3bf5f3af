"""What a rank does: take its place, run the function, report, wait to be let go, leave.

Runs in a process forked from the fork server (or from torch's elastic agent, for scripts). Imports nothing
of the package but its own room, and torch only where it is used.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
import unittest
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ..trace.install import installed
from . import group, libraries, payload, peak, recorder, stacks, wire
from .records import is_of_worker

ATTACHED = "_gputrain_attached"
"""Attribute of an exception whose bytes travel with its report, to ``RankResult.attached``."""


class Link:
    """The rank's end of its socket to the launching process."""

    def __init__(self, fd: int, rank: int, restart: int = 0) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(True)
        self._sock.set_inheritable(False)
        self._reader = wire.Reader(self._sock)
        self._identity = {"rank": rank, "restart": restart, "pid": os.getpid()}

    def hello(self) -> None:
        """Says which process plays which rank."""
        wire.send(self._sock, {"kind": "hello", **self._identity, "at": time.monotonic()})

    def report(self, state: str, body: bytes = b"", **details: Any) -> None:
        """The one report of a rank. A process that the rank forked has none to give and just ends."""
        if os.getpid() != self._identity["pid"]:
            os._exit(0)
        header = {"kind": "report", "state": state, **self._identity, "at": time.monotonic()}
        header |= {"peak_bytes": peak.most_bytes(), **details}
        wire.send(self._sock, header, body)

    def at_rest(self, dirt: Sequence[str]) -> None:
        """Says of a warm rank what the call that it has reported has left behind."""
        wire.send(self._sock, {"kind": "rest", "dirt": list(dirt)})

    def exited(self, rank: int, restart: int, code: int | None, name: str | None) -> None:
        """Says how a worker process ended; sent by the elastic agent, whose children script ranks are."""
        header = {"kind": "exit", "rank": rank, "restart": restart, "exit_code": code, "signal": name}
        wire.send(self._sock, {**header, "at": time.monotonic()})

    def requests(self) -> Iterator[wire.Frame]:
        """What the launching process asks of a warm rank; ends when it closes its side."""
        while True:
            yield from self._reader.frames()
            try:
                if not self._reader.read():
                    return
            except OSError:
                return

    def wait_for_release(self) -> None:
        """Blocks until the launcher closes its side.

        A rank that is done stays, so that what it held for others (store, sockets) lasts as long as they
        run, and a rank that still waits for it is seen to wait, on gloo as on NCCL.
        """
        with contextlib.suppress(OSError):
            self._sock.recv(1)


def run_function(
    link: Link, spec: Mapping[str, Any], rank: int, call: bytes, listen_fd: int | None
) -> NoReturn:
    """A rank's life around a function of the user; ends the process."""
    known = frozenset(sys.modules)
    try:
        link.hello()
        target, args, kwargs = payload.unpack_call(call)
        group.join(spec, rank, listen_fd)
        with tracing(spec, rank):
            value, location = recorder.called(target, args, kwargs)
        body = pack(value, rank)
        flush()
        imported = libraries.imported(known) if rank == 0 else []
        link.report("passed", body, imported=imported, location=location)
    except BaseException as error:  # SystemExit and pytest's outcomes are BaseExceptions
        flush()
        state, details = describe(error)
        link.report(state, getattr(error, ATTACHED, b""), **details)
    link.wait_for_release()
    # Not sys.exit: about half of the ranks that leave gloo undestroyed die of SIGABRT at interpreter exit.
    os._exit(0)


def tracing(spec: Mapping[str, Any], rank: int) -> contextlib.AbstractContextManager[None]:
    """What the launch asked to trace, around the user's code; written into the rank's folder."""
    # Half of what ends the launch, so that the dump is there when it does.
    seconds = min(spec["stall"], spec["timeout"]) / 2
    folder = Path(spec.get("traces") or spec["folder"]) / f"rank{rank}"
    return installed(spec.get("trace"), folder, rank, watchdog_seconds=seconds)


class UnpicklableValue(TypeError):
    """A rank's function returned something that cannot be sent back."""


def pack(value: object, rank: int) -> bytes:
    """A return value as bytes. Raises UnpicklableValue."""
    try:
        return payload.pack_value(value)
    except Exception as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnpicklableValue(
            f"rank {rank} returned a {kind}, which cannot be pickled ({type(error).__name__}: "
            f"{' '.join(safe_str(error).split())[:200]}); return numbers, tensors, text or containers of them"
        ) from None


def describe(error: BaseException) -> tuple[str, dict[str, Any]]:
    """An exception as (state, details) of a report: skipped for a test's skip, failed for all else."""
    if _is_skip(error):
        return "skipped", {"error": _error(error, safe_str(error))}
    if isinstance(error, SystemExit):
        return "failed", {"error": _error(error, f"sys.exit({error.code!r})", "SystemExit")}
    message = safe_str(error)
    if not message and isinstance(error, AssertionError):  # not rewritten: show what was asserted
        message = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return "failed", {"error": _error(error, message)}


def _is_skip(error: BaseException) -> bool:
    """pytest.skip or unittest.SkipTest, recognised without importing pytest."""
    if isinstance(error, unittest.SkipTest):
        return True
    # pytest's outcomes call themselves builtins, for the sake of short tracebacks.
    return any(
        base.__name__ == "Skipped" and base.__module__ in ("builtins", "_pytest.outcomes")
        for base in type(error).__mro__
    )


def _error(error: BaseException, message: str, name: str | None = None) -> dict[str, str | None]:
    tb = error.__traceback__
    # A case's function that returned what cannot be used is in no traceback, and is where the fault is.
    location = getattr(error, "__gputrain_location__", None) or stacks.error_location(tb)
    if is_of_worker(message):
        location = stacks.told_location(message) or location
    if isinstance(error, SyntaxError) and error.filename:  # its place is not in the traceback
        location = f"{error.filename}:{error.lineno}"
    return {
        "type": name or _type_name(type(error)),
        "message": message,
        "traceback": format_error(error, skip_machinery(tb)),
        "location": location,
    }


def _type_name(kind: type[BaseException]) -> str:
    return (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def safe_str(error: BaseException) -> str:
    """``str(error)``, also for an exception whose ``__str__`` raises."""
    try:
        return str(error)
    except Exception as second:  # anything may come out of a user's __str__
        return f"<{type(error).__name__} whose __str__ raised {type(second).__name__}>"


def skip_machinery(tb: TracebackType | None) -> TracebackType | None:
    """The traceback from the user's first frame on, without the tracers' frames; whole if there is none."""
    package = Path(__file__).resolve().parent.parent
    own = (
        "<frozen runpy>",
        *(f"{package}/{room}/" for room in ("launch", "checks", "case", "diagnose", "trace", "plugin")),
    )
    first = tb
    while first is not None and first.tb_frame.f_code.co_filename.startswith(own):
        first = first.tb_next
    return _without_tracers(first, f"{package}/trace/") or tb


def _without_tracers(tb: TracebackType | None, folder: str) -> TracebackType | None:
    frames = []
    while tb is not None:
        frames.append(tb)
        tb = tb.tb_next
    for frame in reversed(frames):
        if not frame.tb_frame.f_code.co_filename.startswith(folder):
            tb = TracebackType(tb, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return tb


def format_error(error: BaseException, tb: TracebackType | None) -> str:
    """The traceback as Python prints it; never raises, whatever the exception does."""
    try:
        return "".join(traceback.format_exception(type(error), error, tb))
    except Exception:  # a broken __cause__ or __notes__ of the user's exception
        return "".join(traceback.format_tb(tb)) + f"{type(error).__name__}: {safe_str(error)}\n"


def flush() -> None:
    """Writes out what the function has printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
