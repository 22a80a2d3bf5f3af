"""Where kept ranks write: one folder for all their calls, whose files stay open.

Making a folder and opening files for every call would take a third of its time. So a rank empties its files
as a call begins, and what a call has written goes to the launch's own folder once it is over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from . import calls, output
from .folder import Folder

STREAMS = ("stdout.log", "stderr.log", "crash.txt", "stacks.txt")


class WarmFolder:
    """The folder of one set of ranks, in memory where there is plenty; it ends with them."""

    def __init__(self, world_size: int) -> None:
        # Not the name of a result's folder: it stays while results go, and its server removes it.
        self.path = output.temporary_folder(f"{output.TEMPORARY}ranks-{os.getpid()}-")
        self._ranks = [f"rank{rank}" for rank in range(world_size)]

    def hand_out(self, folder: Folder, *, printed: bool) -> None:
        """Puts the files of a call into the launch's folder. The ranks go on and write to theirs."""
        if printed or folder.made:
            self._copy_streams(folder.path())
        else:
            folder.fill = partial(_empty_streams, self._ranks)

    def hand_over(self, folder: Folder) -> None:
        """Puts all there is into the launch's folder, and ends this one. The ranks are gone."""
        try:
            target = folder.path()
            for rank in self._ranks:
                (target / rank).mkdir(exist_ok=True)
                for path in _files(self.path / rank):
                    shutil.move(path, target / rank / path.name)
        finally:
            self.end()

    def end(self) -> None:
        """Removes it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _copy_streams(self, target: Path) -> None:
        _empty_streams(self._ranks, target)
        for rank in self._ranks:
            for path in _files(self.path / rank):
                if path.name in STREAMS and path.stat().st_size:
                    shutil.copyfile(path, target / rank / path.name)


def _files(folder: Path) -> Iterable[Path]:
    """What a rank has left; its ring is for those alone who look at it while it runs."""
    if not folder.is_dir():  # it never started
        return []
    return [path for path in folder.iterdir() if path.name != calls.FILE]


def _empty_streams(ranks: Iterable[str], target: Path) -> None:
    for rank in ranks:
        (target / rank).mkdir(exist_ok=True)
        for name in STREAMS:
            (target / rank / name).touch()
