"""The cache of discoveries: one JSON file a key, read and written by any number of processes at once.

    batch-size-HASH.json    the key, what was measured, and a checksum of both
    batch-size-HASH.lock    held by the process that discovers; the kernel drops it with its process

A file is replaced as a whole, so a reader sees the old one or the new one. What cannot be read, is another
key's, another version's or not ours is passed over and written anew. Nothing here raises for the state of the
folder: a cache that cannot be used costs a discovery and one warning. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_gputrain.batch.cache_entry import Entry

FORMAT = "pytest-gputrain batch size"
VERSION = 1
"""Part of every key as well: what a probe does changes with it, so does what its peaks mean."""

# A discovery takes seconds on a GPU and minutes on a CPU. A process that is stopped (Ctrl-Z, a debugger)
# while it holds the lock must not stop the others for ever: after this they discover for themselves.
LOCK_TIMEOUT = 600.0
LOCK_POLL = 0.02
MOST_BYTES = 1 << 20  # an entry takes some kilobytes; what is larger is not one
ABANDONED = 3600.0  # seconds after which a temporary file's writer is taken for dead

_log = logging.getLogger("pytest_gputrain.batch")
_told: set[str] = set()

Key = Mapping[str, Any]


class BatchCache:
    """The entries of one folder. Nothing is opened or made before it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Key) -> Path:
        """Return the file that keeps this key's entry."""
        return self.folder / f"batch-size-{_digest(key)[:32]}.json"

    def load(self, key: Key) -> Entry | None:
        """Return the entry of exactly this key; None where there is none that can be trusted."""
        try:
            document = json.loads(_read(self.path(key)))
            if document["format"] != FORMAT or document["version"] != VERSION:
                return None
            # The key itself, not its hash: a file copied to this name is another key's.
            if _canonical(document["key"]) != _canonical(key):
                return None
            if document["checksum"] != _digest({"key": document["key"], "entry": document["entry"]}):
                return None
            return Entry.from_json(document["entry"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def store(self, key: Key, entry: Entry) -> None:
        """Write the entry in the place of whatever is there. A folder that cannot be written: one warning."""
        body = {"key": json.loads(_canonical(key)), "entry": entry.as_json()}
        document = {"format": FORMAT, "version": VERSION, **body, "checksum": _digest(body)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.path(key), json.dumps(document, indent=1).encode())
            self._sweep()
        except OSError as error:
            self._warn(error)

    @contextlib.contextmanager
    def lock(self, key: Key, timeout: float = LOCK_TIMEOUT) -> Iterator[bool]:
        """Hold this key's lock, so that of several processes one discovers and the others find its entry:
        ``load`` again once it is held. Gives False, and goes on, where it cannot be had: the folder cannot be
        written, or another process has held it for ``timeout`` seconds.
        """
        lock = self._acquired(self.path(key).with_suffix(".lock"), timeout)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):
                    lock.release()

    def _acquired(self, path: Path, timeout: float) -> Any:
        from filelock import FileLock, Timeout  # on demand: it takes 40 ms to import

        # Not filelock's stand-in where flock is missing: it would outlive its process.
        more: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
        lock = FileLock(path, thread_local=False, **more)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout, poll_interval=LOCK_POLL)
        except Timeout:
            _log.warning(
                "batch-size cache: %s has been held for %.0f s by a process that does not go on; "
                "discovering without waiting for it",
                path,
                timeout,
            )
            return None
        except OSError as error:
            self._warn(error)
            return None
        return lock

    def _sweep(self) -> None:
        """Remove temporary files of writers that were killed."""
        for path in self.folder.glob(".batch-size-*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _warn(self, error: OSError) -> None:
        if str(self.folder) not in _told:  # once a process, however many batch sizes it looks for
            _told.add(str(self.folder))
            _log.warning(
                "batch-size cache: %s cannot be written (%s); going on without it; give another folder by "
                "--gputrain-cache-dir or GPUTRAIN_CACHE_DIR",
                self.folder,
                error.strerror or error,
            )


def _read(path: Path) -> bytes:
    # Not blocking: at this name may lie anything, a pipe too.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError("not an entry")
        return file.read()


def _replace(path: Path, data: bytes) -> None:
    """Write a file as a whole, on the disk before it has its name. Raises OSError."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{time.monotonic_ns()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _canonical(value: object) -> str:
    """The one text of a JSON value; raises ValueError or TypeError for what JSON cannot say."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
