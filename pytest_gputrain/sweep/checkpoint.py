"""The checkpoint that all branches start from: looked at once, before anything runs.

It is read without running code of its own (``weights_only=True``). What it holds is the script's affair; only
the learning rates in its optimizer state matter here, because loading them can overwrite a branch's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.sweep.config_file import SweepError

_DEPTH = 8  # of nested containers that are looked through; state dicts are shallower


@dataclass(frozen=True)
class CheckpointFile:
    """sha256: of the file. rates: every learning rate in optimizer state that it holds, sorted."""

    path: Path
    sha256: str
    rates: tuple[float, ...]
    size: int
    modified_ns: int

    def is_unchanged(self) -> bool:
        """Whether the file is still what it was; its time and size first, which are cheap to ask for."""
        try:
            now = os.stat(self.path)
            if (now.st_size, now.st_mtime_ns) == (self.size, self.modified_ns):
                return True
            return _digest(self.path) == self.sha256
        except OSError:
            return False


def read_checkpoint(path: Path) -> CheckpointFile:
    """Raises SweepError, one line, for a file that is missing, foreign, or needs more than plain data."""
    if not path.is_file():
        why = "is a folder, give one file" if path.is_dir() else "there is no such file"
        raise SweepError(f"--checkpoint {path}: {why}; give a file that torch.save wrote")
    try:
        stat, sha256 = os.stat(path), _digest(path)
    except OSError as error:
        raise SweepError(
            f"--checkpoint {path}: cannot be read ({error.strerror or error}); give a file that can be"
        ) from None
    content = _loaded(path)
    if not any(_is_tensor(value) for value in _values(content)):
        raise SweepError(
            f"--checkpoint {path}: it holds no tensor, so no weights; give a checkpoint of the base run"
        )
    return CheckpointFile(path, sha256, tuple(sorted(_rates(content))), stat.st_size, stat.st_mtime_ns)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def _loaded(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle's protocol; what is wrong is said below
            try:  # tensors stay on the disk
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for files that it did not write
        raise SweepError(
            f"--checkpoint {path}: {_why_not(error)}; save state dicts and plain values with torch.save"
        ) from None


def _why_not(error: Exception) -> str:
    """In our words: torch's are many lines, and advise to run what the file holds."""
    if isinstance(error, MemoryError):
        return "it does not fit in this machine's memory"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, which torch does not load with weights_only=True"
    return "torch.save did not write it, or it is cut short"


def _values(content: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The content and whatever its containers hold."""
    yield content
    if depth and isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _values(value, depth - 1)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _rates(content: Any) -> set[float]:
    found = set()
    for value in _values(content):
        groups = value.get("param_groups") if isinstance(value, dict) else None
        for group in groups if isinstance(groups, list) else ():
            for name in ("lr", "initial_lr"):
                if isinstance(group, dict) and isinstance(group.get(name), (int, float)):
                    found.add(float(group[name]))
    return found
