"""Which line of the user's made a tensor: found by walking frames, cheap enough for each large one."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent.parent) + os.sep
# Of this package, what a user's model may well be.
_REFERENCE = _OURS + "reference" + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_LIBRARIES = ("/site-packages/", "/dist-packages/")

# How far from the user's code the code of a file is.
_USERS, _LIBRARY, _MACHINERY = range(3)

Line = tuple[str, int, str]
"""File, line number and function."""


def creating_lines() -> tuple[Line | None, Line | None]:
    """(the user's line, the line of an installed library that it called) of who runs torch right now."""
    library: Line | None = None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        kind = _kind(code.co_filename)
        if kind == _USERS:
            return (code.co_filename, frame.f_lineno, code.co_name), library
        if kind == _LIBRARY and library is None:
            library = (code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None, library


def location(lines: tuple[Line | None, Line | None]) -> str | None:
    """``train.py:57 in step``, and ``, through modeling_gpt2.py:310 in forward`` in a library."""
    told = [f"{Path(file).name}:{number} in {name}" for file, number, name in filter(None, lines)]
    return ", through ".join(told) or None


@functools.cache
def _kind(file: str) -> int:
    if file.startswith((_TORCH, "<frozen", "<string")):
        return _MACHINERY
    if file.startswith(_OURS):
        return _LIBRARY if file.startswith(_REFERENCE) else _MACHINERY
    if any(place in file for place in _LIBRARIES):
        return _MACHINERY if "/_pytest/" in file or "/pluggy/" in file else _LIBRARY
    return _MACHINERY if file.startswith(_STDLIB) else _USERS
