"""Where a rank is: from faulthandler's dump or a traceback to a line in the user's code."""

from __future__ import annotations

import importlib.util
import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_TOLD = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)$', re.MULTILINE)
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_CHECKING = tuple(f"{_PACKAGE}/{room}/" for room in ("case", "checks", "diagnose", "tensor_parallel"))
_STDLIB = str(Path(os.__file__).parent) + os.sep
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")

# The Python frames under which a rank waits for others: collectives, stores, and backward, where the
# reducer waits in C++ for its buckets.
_COLLECTIVE = re.compile(
    r"torch/distributed/(distributed_c10d|rendezvous|_functional_collectives|_tensor|fsdp|device_mesh)"
    r"|torch/nn/parallel/distributed\.py|torch/autograd/graph\.py"
)


_ENGINE = "torch/autograd/graph.py"
_ANSWERING = re.compile(re.escape(_PACKAGE) + r'/launch/recorder\.py", line \d+ in _serve')
_WRAPPERS = ("wrapper", "inner", "_wrapped_call_impl", "_call_impl", "decorate_context", "_fn")
_WAITING_FILES = ("/threading.py", "/queue.py", "/selectors.py")

DUMP_MARK = "--- dump "
"""Written between the dumps of one file."""


@dataclass(frozen=True)
class Frame:
    """One Python frame, innermost first in a list."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """``file:line in function``, the file relative to the working directory if it is below it."""
        try:
            file = self.file.removeprefix(os.getcwd() + os.sep)
        except FileNotFoundError:  # the user's function has removed the folder it was in
            file = self.file
        return f"{file}:{self.line} in {self.function}"


def main_thread(dump: str) -> list[Frame]:
    """The frames of the rank's main thread in a faulthandler dump, innermost first; empty if there is none.

    The main thread is the one that runs this package's rank code; without it (a crash that was cut short)
    the thread marked as current.
    """
    threads = _threads(dump)
    for _, frames in threads:
        if any(_is_ours(frame.file) for frame in frames):
            return frames
    return next((frames for current, frames in threads if current), [])


def _threads(dump: str) -> list[tuple[bool, list[Frame]]]:
    """(whether it is marked as current, its frames) of every thread in a faulthandler dump."""
    threads: list[tuple[bool, list[Frame]]] = []
    for line in without_recorder(dump).splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            threads.append((line.startswith("Current"), []))
        elif threads and (match := _FRAME.match(line)):
            threads[-1][1].append(Frame(match["file"], int(match["line"]), match["function"]))
    return threads


def side_thread_works(dump: str) -> bool:
    """Whether a thread beside the main one is busy in code that is not torch's or the standard library's.

    One that waits for another thread (a queue's reader, a progress bar's monitor) is not busy.
    """
    others = [frames for _, frames in _threads(dump) if not any(_is_ours(frame.file) for frame in frames)]
    busy = [frames for frames in others if frames and not frames[0].file.endswith(_WAITING_FILES)]
    return any(user_frame(frames) is not None for frames in busy)


def without_recorder(dump: str) -> str:
    """A dump without the thread that answers for a rank: it is nobody's concern."""
    blocks = dump.split("\n\n")
    return "\n\n".join(block for block in blocks if not _ANSWERING.search(block))


def last_dump(dump: str) -> str:
    """The last of several dumps in one file, without the frames below this package's rank code."""
    lines: list[str] = []
    below = False
    for line in without_recorder(dump).rstrip().splitlines():
        if line.startswith(DUMP_MARK):
            lines, below = [], False
            continue
        match = _FRAME.match(line)
        below = match is not None and (below or _is_ours(match["file"]))
        if not below:
            lines.append(line)
        elif match and not (lines and lines[-1].startswith("  (")):
            lines.append("  (below: pytest_gputrain.launch)")
    return "\n".join(lines)


def user_frame(frames: Sequence[Frame]) -> Frame | None:
    """The innermost frame in the user's own code.

    Their code is what is neither torch, nor the standard library, nor this package's machinery. An
    installed third-party library counts only if nothing else is left, and this package's checks and
    default steps only after that.
    """
    candidates = [frame for frame in frames if not _is_machinery(frame.file)]
    theirs = [frame for frame in candidates if not frame.file.startswith(_CHECKING)]
    own = [frame for frame in theirs if not _INSTALLED.search(frame.file)]
    return next(iter(own or theirs or candidates), None)


def in_collective(frames: Sequence[Frame]) -> bool:
    """Whether the frames above the user's own say that the rank waits for others."""
    for frame in frames:
        if _COLLECTIVE.search(frame.file):
            return True
        if not _is_machinery(frame.file) and not _INSTALLED.search(frame.file):
            return False
    return False


def in_backward(frames: Sequence[Frame]) -> bool:
    """Whether the rank is in autograd's engine and in no function of torch's above it: the frames do not tell
    whether the engine works, or waits for DistributedDataParallel's buckets.
    """
    return bool(frames) and frames[0].file.endswith(_ENGINE)


def waits_in(frames: Sequence[Frame]) -> str | None:
    """The torch function that the user's line called and that has not returned; None for other code."""
    called = None
    for frame in frames:
        if is_users(frame.file):
            break
        if frame.function not in _WRAPPERS and frame.file.startswith(_torch_folder()):
            called = frame.function
    return called


def is_installed(file: str) -> bool:
    """Whether a file belongs to an installed library."""
    return _INSTALLED.search(file) is not None


def is_users(file: str) -> bool:
    """Whether a file is neither torch's nor the standard library's, installed, or this package's."""
    return not (_is_machinery(file) or file.startswith(_CHECKING) or _INSTALLED.search(file))


def told_location(message: str) -> str | None:
    """The same for a traceback that is part of an error's message, as of a data loader's worker; or None."""
    frames = [Frame(one["file"], int(one["line"]), one["function"]) for one in _TOLD.finditer(message)]
    frame = user_frame(frames[::-1])
    return str(frame) if frame else None


def error_location(tb: TracebackType | None) -> str | None:
    """``file:line in function`` of the innermost user frame of a traceback, or None."""
    frames = [Frame(f.filename, f.lineno or 0, f.name) for f in reversed(traceback.extract_tb(tb))]
    frame = user_frame(frames)
    return str(frame) if frame else None


@lru_cache(maxsize=1)
def _torch_folder() -> str:
    """Where torch is, without importing it; it may be a build in somebody's home."""
    spec = importlib.util.find_spec("torch")
    return str(Path(spec.origin).parent) + os.sep if spec and spec.origin else "/no/torch/"


def _is_ours(file: str) -> bool:
    return file.startswith((_PACKAGE + "/launch/", _PACKAGE + "/plugin/"))


@lru_cache(maxsize=4096)
def _is_machinery(file: str) -> bool:
    if file.startswith(("<frozen", "<string>")) or _is_ours(file):  # <string>: the server's bootstrap
        return True
    if file.startswith(_PACKAGE + "/trace/"):
        return True
    if file.startswith(_torch_folder()):
        return True
    return file.startswith(_STDLIB) and not _INSTALLED.search(file)
