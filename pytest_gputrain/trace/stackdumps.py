"""Files with a rank's stacks: ``watchdog_stackdump_rank{r}_<ts>.txt``. Imports no torch.

faulthandler writes from C into one file, pending, because it needs a descriptor beforehand and can answer
while Python cannot run. What is found there becomes a dump with a name of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_gputrain.trace.lines import PENDING_STACKS, stackdump_file

_PY_SPY_SECONDS = 10.0


def write(folder: Path, rank: int, text: str) -> Path:
    """A new dump."""
    path = _new_name(folder, rank, time.time())
    path.write_text(text, encoding="utf-8")
    return path


def settle(folder: Path, rank: int) -> None:
    """After a rank's end: what faulthandler wrote and no Python came to read becomes a dump, nothing goes."""
    pending = folder / PENDING_STACKS
    with contextlib.suppress(OSError):
        status = pending.stat()
        if status.st_size == 0:
            pending.unlink()
        else:
            pending.rename(_new_name(folder, rank, status.st_mtime))


def python_stacks() -> str:
    """Every thread of this process, the innermost frame first.

    By faulthandler, in a millisecond: reading the lines of code would cost so much CPU that the launch took
    this rank for one that moves.
    """
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def native_stacks() -> str:
    """What py-spy says of this process, C frames too; empty where it is not installed or not allowed to."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.is_file() else shutil.which("py-spy")
    if program is None:
        return ""
    command = [program, "dump", "--native", "--pid", str(os.getpid())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy did not answer: {error}\n"
    return done.stdout if done.returncode == 0 else f"py-spy failed: {done.stderr.strip()[-300:]}\n"


def _new_name(folder: Path, rank: int, at: float) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(at))
    number = 1
    while (path := folder / stackdump_file(rank, f"{stamp}-{number}" if number > 1 else stamp)).exists():
        number += 1
    return path
