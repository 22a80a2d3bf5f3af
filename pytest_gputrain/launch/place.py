"""Turns a forked process into a rank: nothing of its parent is left but what was meant for it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from . import output, process, recorder, sweep

DUMP_SIGNAL = getattr(signal, "SIGRTMAX", 64) - 3  # macOS has no real-time signals, and no launches
"""Asks a rank for its stacks. A real-time signal, because scripts take SIGUSR1 for themselves."""


def take_place(
    parent: int, folder: Path, rank: int, environ: Mapping[str, str], cwd: str | None
) -> dict[str, int]:
    """Turns a forked process into a rank: own session, own output files, own environment, no inherited traps.

    A negative ``rank`` is an elastic agent: -1 for the first node's. ``environ`` is taken as it is.
    Returns the descriptors of its output files by name. Raises OSError when ``cwd`` is gone.
    """
    os.setsid()
    process.die_with_parent(parent)
    _reset_signals()
    streams = _redirect(folder / (f"rank{rank}" if rank >= 0 else f"agent{-1 - rank}"))
    os.environ.clear()
    os.environ.update(environ)
    tempfile.tempdir = None  # it follows TMPDIR; the server's torch, where it has triton, has asked already
    if cwd is not None:
        os.chdir(cwd)
    _new_randomness()
    if rank >= 0:
        recorder.place(str(folder / f"rank{rank}"), environ.get(sweep.MARK), rank)
    return streams


def _new_randomness() -> None:
    """Unseeded generators as in a new process: forked as they are, every rank would draw the same numbers."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def _reset_signals() -> None:
    """Signal handling as in a new Python process: what the parent set up was for the parent."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _redirect(folder: Path) -> dict[str, int]:
    """Points descriptors 0, 1, 2 at /dev/null and the rank's files, faulthandler at files of its own."""
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    for number, name in ((1, "stdout.log"), (2, "stderr.log")):
        fd = output.open_stream(folder / name)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    # By line, so that the last words of a rank that is killed are in the file.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    crash, dumps = (output.open_stream(folder / name) for name in ("crash.txt", "stacks.txt"))
    faulthandler.enable(crash, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, dumps, all_threads=True, chain=False)
    return {"stdout.log": 1, "stderr.log": 2, "crash.txt": crash, "stacks.txt": dumps}
