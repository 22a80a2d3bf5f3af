"""Each rank's output: a file that a rank can write without end and that never fills disk or memory.

Ranks write to plain files, not to pipes, so that nobody blocks on a reader and a hung rank's last words
are there. A file that outgrows its bound keeps its first and last part; the middle is given back to the
file system (a hole), while the rank goes on writing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

KEEP_HEAD = KEEP_TAIL = 128 * 1024
"""Bytes of a stream that are kept at either end: the banner and the last words."""
_PUNCH_OVER = 8 << 20
"""A file is cut down once it is larger than this; below, punching would cost more than it frees."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


@lru_cache(maxsize=1)
def _fallocate() -> Any | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


def relieve(path: Path) -> None:
    """Gives the middle of a file that has grown too large back to the file system, in place.

    Where the file system knows no holes the file just grows: that costs disk, never memory.
    """
    try:
        size = path.stat().st_size
        if size <= _PUNCH_OVER or path.stat().st_blocks * 512 <= _PUNCH_OVER:
            return
        fallocate = _fallocate()
        if fallocate is not None:
            # Whole blocks only; the tail kept is generous because the rank writes on meanwhile.
            start, end = 1 << 20, (size - (1 << 20)) // 4096 * 4096
            with path.open("r+b") as file:
                fallocate(file.fileno(), _KEEP_SIZE | _PUNCH_HOLE, start, end - start)
    except OSError:
        return


def read(path: Path) -> str:
    """The text of a stream; of a long one the first and the last 128 KiB, with the cut marked."""
    try:
        size = os.stat(path).st_size
        if not size:  # most streams of most ranks
            return ""
        with path.open("rb") as file:
            if size <= KEEP_HEAD + KEEP_TAIL:
                return file.read().decode(errors="replace")
            head = file.read(KEEP_HEAD)
            file.seek(size - KEEP_TAIL)
            tail = file.read(KEEP_TAIL)
    except OSError:
        return ""
    cut = f"\n[... {size - KEEP_HEAD - KEEP_TAIL:,} bytes cut here by pytest-gputrain ...]\n"
    return head.decode(errors="replace") + cut + tail.decode(errors="replace")


def compact(path: Path, text: str) -> None:
    """Replaces a file that was cut down by what ``read`` made of it, so that no sparse file stays behind."""
    try:
        if path.stat().st_size > _PUNCH_OVER:
            path.write_text(text)
    except OSError:
        return


def last_lines(text: str, count: int) -> str:
    """The last ``count`` lines, each cut at 400 characters, with what was left out said in front."""
    lines = [line if len(line) <= 400 else line[:397] + "..." for line in text.rstrip("\n").split("\n")]
    if len(lines) <= count:
        return "\n".join(lines)
    before = len(lines) - count
    return "\n".join([f"[{before} line{'s' * (before > 1)} before]", *lines[-count:]])


def rank_list(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-3``, ``ranks 0-1, 3``."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(numbers) == 1 else f"ranks {text}"


# What ranks do, as it is said of one: of several the verb is another.
_OF_SEVERAL = {"waits ": "wait ", "is ": "are ", "was ": "were ", "has ": "have "}


def told_of(ranks: Sequence[int], fate: str) -> str:
    """``rank 0: waits in …``, ``ranks 0-1: wait in …``"""
    if len(ranks) > 1:
        verb = next((verb for verb in _OF_SEVERAL if fate.startswith(verb)), "")
        fate = _OF_SEVERAL.get(verb, "") + fate.removeprefix(verb)
    return f"{rank_list(ranks)}: {fate}"


def grouped(texts: dict[int, str]) -> list[tuple[list[int], str]]:
    """Ranks that said the same, together: ``[([0, 1, 3], "..."), ([2], "...")]``; empty texts left out."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        if text.strip():
            groups.setdefault(text, []).append(rank)
    return [(ranks, text) for text, ranks in groups.items()]


_MEMORY = "/dev/shm"
_FREE = 4 << 30
"""Bytes that must be free in memory: ranks that print without end are cut down a few times a second."""


TEMPORARY = "gputrain-"
"""How the names of temporary folders begin; the process id of their owner follows."""


def temporary_folder(prefix: str) -> Path:
    """A new folder for the output of functions, in memory where there is plenty.

    On a disk, making and removing it takes longer than a warm call. Whoever sets TMPDIR gets it there.
    """
    if tempfile.gettempdir() == "/tmp" and not any(map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))):
        with suppress(OSError):
            found = os.statvfs(_MEMORY)
            if found.f_bavail * found.f_frsize >= _FREE:
                return Path(tempfile.mkdtemp(prefix=prefix, dir=_MEMORY))
    return Path(tempfile.mkdtemp(prefix=prefix))


FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
"""How a stream is opened. O_APPEND, so that holes and restarts lose nothing."""


def open_stream(path: Path) -> int:
    """A descriptor to write a stream to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, FLAGS, 0o644)
