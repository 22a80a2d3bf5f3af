"""The folder through which the processes of one host agree on who holds which GPU.

    queue.lock                  held for some milliseconds by whoever looks at or changes the rest
    gpu-UUID.lock, .json        locked while the GPU is held; who holds it, for people
    wait-NUMBER.lock, .json     locked while somebody waits; what that request needs
    bell                        changes when a GPU comes free, so that waiting costs next to nothing

What counts is the locks alone: the kernel drops them with their process, however it ends. The JSON is for
people and for the order of the queue, so what cannot be read in it is passed over. Everything may be used by
every user of the host: GPUs are shared between them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

# As for the temporary folder itself: everybody may add files, and remove none but their own.
FOLDER_MODE = 0o1777
FILE_MODE = 0o666
# The queue is held for milliseconds; a process that is stopped while it holds it must not stop all for ever.
QUEUE_DEADLINE = 60.0
QUEUE_POLL = 0.003

WAY_OUT = "give a folder that this user can write, by --gputrain-lease-dir or GPUTRAIN_LEASE_DIR"


class LeaseFolderError(ValueError):
    """The folder cannot be used; one line that says which, why and what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"lease folder {str(self.path)!r} {self.why}; {WAY_OUT}"


def default_path() -> Path:
    """Return the folder that all runs on this host share unless they say otherwise."""
    return Path(tempfile.gettempdir()) / "gputrain-leases"


class LeaseFolder:
    """The files of one folder. Nothing is opened or made before ``prepare``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the folder if it is missing, and lock and write in it once. Raises ``LeaseFolderError``."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # another user's, who has set it
                if stat.S_IMODE(self.path.stat().st_mode) != FOLDER_MODE:
                    self.path.chmod(FOLDER_MODE)
        except (FileExistsError, NotADirectoryError):
            raise LeaseFolderError(self.path, "is not a folder") from None
        except OSError as error:
            raise self._unusable(error) from None
        with self.queue():
            self.write("probe", {"writable": True})
            self.remove("probe")

    @contextlib.contextmanager
    def queue(self, within: float = QUEUE_DEADLINE) -> Iterator[None]:
        """Hold the queue. Raises ``LeaseFolderError``, also after ``within`` seconds."""
        from filelock import Timeout

        lock = self._lock("queue.lock")
        try:
            lock.acquire(timeout=within, poll_interval=QUEUE_POLL)
        except Timeout:
            why = f"is held by a process that does not go on (waited {within:.0f} s for queue.lock)"
            raise LeaseFolderError(self.path, why) from None
        except OSError as error:
            raise self._unusable(error) from None
        try:
            yield
        finally:
            lock.release()

    def try_lock(self, name: str) -> BaseFileLock | None:
        """Return the lock of that file, held, or None when another process holds it."""
        from filelock import Timeout

        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        return lock

    def _lock(self, name: str) -> BaseFileLock:
        from filelock import FileLock  # on demand: most sessions lease nothing, and it takes 40 ms to import

        # A file system without flock: its stand-in would outlive its process. Older filelock has none.
        more: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
        # Not thread-local: who releases may be another thread than who acquired.
        return FileLock(self.path / name, mode=FILE_MODE, thread_local=False, **more)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a record. Raises ``LeaseFolderError``, for a full disk too.

        In place: in a sticky folder nobody may replace a file of another user. A reader may see half of it,
        and passes over that.
        """
        try:
            fd = self._open(f"{name}.json")
            try:
                data = json.dumps(record).encode()
                while data:
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)
        except OSError as error:
            raise self._unusable(error) from None

    def _open(self, name: str) -> int:
        """A file to write, emptied. O_CREAT alone is refused for another user's file in a sticky folder."""
        path = self.path / name
        flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, FILE_MODE)
        with contextlib.suppress(OSError, AttributeError):
            os.fchmod(fd, FILE_MODE)  # whatever the umask
        return fd

    def read(self, name: str) -> dict[str, Any]:
        """Return a record; an empty one where there is none that can be read."""
        try:
            record = json.loads((self.path / f"{name}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def touch(self, name: str) -> None:
        """Show that whoever wrote the record still goes on."""
        with contextlib.suppress(OSError):
            os.utime(self.path / f"{name}.json")

    def age(self, name: str) -> float:
        """Seconds since a record was written or touched."""
        with contextlib.suppress(OSError):
            return time.time() - (self.path / f"{name}.json").stat().st_mtime
        return math.inf

    def remove(self, name: str) -> None:
        """Remove a lock and its record, as far as this user may."""
        for suffix in (".json", ".lock"):
            with contextlib.suppress(OSError):
                (self.path / f"{name}{suffix}").unlink()

    def names(self, kind: str) -> list[str]:
        """Return the names of the locks of that kind, without suffix, in order."""
        with contextlib.suppress(OSError):
            return sorted(path.stem for path in self.path.glob(f"{kind}-*.lock"))
        return []

    def ring(self) -> None:
        """Tell who waits that a GPU has come free. Who misses it looks again after a while."""
        with contextlib.suppress(OSError):
            fd = self._open("bell")
            try:
                os.write(fd, os.urandom(8))
            finally:
                os.close(fd)

    def bell(self) -> bytes:
        """Return what changes with every ring."""
        with contextlib.suppress(OSError):
            return (self.path / "bell").read_bytes()
        return b""

    def _unusable(self, error: OSError) -> LeaseFolderError:
        return LeaseFolderError(self.path, f"cannot be used ({error.strerror or error})")


def gpu_name(uuid: str) -> str:
    """Return the name of a GPU's files. Some UUIDs of MIG slices contain slashes."""
    return "gpu-" + re.sub(r"[^\w.-]", "_", uuid)
