"""The folder of a launch's files: made when the first of them comes, or when somebody asks where it is.

A warm call that passed and printed nothing has no files, and making a folder takes longer than the call.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import output

_numbers = itertools.count()


class Folder:
    """A place for ``artifacts``: in a folder that stays, or a temporary one that goes with this object."""

    def __init__(self, base: Path | None, name: str, *, in_memory: bool = True) -> None:
        self.number = next(_numbers)
        """Tells it from every other one of this process."""
        self.temporary = base is None
        self.fill: Callable[[Path], None] | None = None
        """What puts the files of a launch into a folder that nobody has needed so far."""
        self._base, self._name, self._in_memory = base, name, in_memory
        self._path: Path | None = None

    @classmethod
    def at(cls, path: Path) -> Folder:
        """A folder that is there already, and stays."""
        folder = cls(path.parent, path.name)
        folder._path = path
        return folder

    @property
    def made(self) -> bool:
        """Whether it is there."""
        return self._path is not None

    def path(self) -> Path:
        """Where it is. Raises OSError when it cannot be made."""
        if self._path is None:
            self._path = self._made()
            if self.fill is not None:
                self.fill(self._path)
        return self._path

    def _made(self) -> Path:
        if self._base is not None:
            path = self._base / f"{self._name}-{os.getpid()}-{self.number}"
            path.mkdir(parents=True)
            return path
        prefix = f"{output.TEMPORARY}{os.getpid()}-"
        path = output.temporary_folder(prefix) if self._in_memory else Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return path

    def discard(self) -> None:
        """Removes it, if it is a temporary one, of a launch that has no result."""
        if self.temporary and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder.at, (self.path(),)  # the copy is another process's, who does not own it

    def __repr__(self) -> str:
        return f"Folder({str(self._path or self._base or 'temporary')!r})"
