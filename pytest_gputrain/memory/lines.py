"""Which line of the user's made a tensor: found by walking frames, cheap enough for each large one."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent.parent) + os.sep
# Of this package, what a user's model may well be.
_REFERENCE = _OURS + "reference" + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_LIBRARIES = ("/site-packages/", "/dist-packages/")
_MACHINERY_OF_TESTS = ("/_pytest/", "/pluggy/", "/pytest.py")
# The frame around whatever torch.compile was given, also where torch runs that uncompiled.
_COMPILED = (os.path.join(_TORCH, "_dynamo", "eval_frame.py"), "compile_wrapper")
_DDP = os.path.join(_TORCH, "nn", "parallel", "distributed.py")
# Frames that may stand between who runs torch and who watches.
_BETWEEN = (os.path.join(_OURS, "memory"), os.path.join(_TORCH, "_compile.py"), _COMPILED[0])

_USERS, _LIBRARY, _MACHINERY = range(3)

Line = tuple[str, int, str]
"""File, line number and function."""
Lines = tuple[Line | None, Line | None]
"""The user's line, and the line of an installed library that it called."""


def creating_lines() -> Lines:
    """The lines of whoever runs torch right now."""
    return _picked(_outward(sys._getframe(1)))


def raising_lines(trace: TracebackType | None) -> Lines:
    """The lines in which an exception with this traceback was raised."""
    inward: list[tuple[CodeType, int]] = []
    while trace is not None:
        inward.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return _picked(reversed(inward))


def without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The traceback up to whoever ran torch: what this package and torch add below that says nothing."""
    links: list[TracebackType] = []
    while trace is not None:
        links.append(trace)
        trace = trace.tb_next
    while len(links) > 1 and links[-1].tb_frame.f_code.co_filename.startswith(_BETWEEN):
        links.pop()
    for link in reversed(links):
        trace = TracebackType(trace, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return trace


def location(lines: Lines) -> str | None:
    """``train.py:57 in step``, and ``, through modeling_gpt2.py:310 in forward`` in a library."""
    told = [f"{Path(file).name}:{number} in {name}" for file, number, name in filter(None, lines)]
    return ", through ".join(told) or None


def is_under_compile() -> bool:
    """Whether this runs inside a function that torch.compile was given."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _COMPILED[1] and frame.f_code.co_filename == _COMPILED[0]:
            return True
        frame = frame.f_back
    return False


def is_of_ddp() -> bool:
    """Whether DistributedDataParallel itself runs torch right now: it allocates its buckets then."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == _DDP


def is_users(file: str) -> bool:
    """Whether a file is the user's own: of no installed package, nor of Python."""
    return _kind(file) == _USERS


def is_ours(file: str) -> bool:
    """Whether a file belongs to this package."""
    return file.startswith(_OURS)


def _outward(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    while frame is not None:
        if _kind(frame.f_code.co_filename) != _MACHINERY:  # most are, and a line number is dear
            yield frame.f_code, frame.f_lineno
        frame = frame.f_back


def _picked(outward: Iterable[tuple[CodeType, int]]) -> Lines:
    library: Line | None = None
    for code, number in outward:
        kind = _kind(code.co_filename)
        if kind == _USERS:
            return (code.co_filename, number, code.co_name), library
        if kind == _LIBRARY and library is None:
            library = (code.co_filename, number, code.co_name)
    return None, library


@functools.cache
def _kind(file: str) -> int:
    if file.startswith((_TORCH, "<frozen", "<string")):
        return _MACHINERY
    if file.startswith(_OURS):
        return _LIBRARY if file.startswith(_REFERENCE) else _MACHINERY
    if any(place in file for place in _LIBRARIES):
        return _MACHINERY if any(place in file for place in _MACHINERY_OF_TESTS) else _LIBRARY
    return _MACHINERY if file.startswith(_STDLIB) else _USERS
