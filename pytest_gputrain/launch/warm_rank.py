"""A rank that stays: runs one call after another in the same process and process group.

After each call it looks for what the function left behind: for what goes on by itself before it reports, for
all else afterwards, when nobody waits for it. Whether it is used again is decided by the launching process,
which knows all ranks; a rank that is not wanted any more sees the end of its socket and leaves.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from . import (
    calls,
    dirt,
    dirt_python,
    dirt_torch,
    group,
    libraries,
    output,
    payload,
    peak,
    rank,
    recorder,
    sweep,
)


def run(
    link: rank.Link,
    spec: Mapping[str, Any],
    number: int,
    call: bytes,
    listen_fd: int | None,
    streams: Mapping[str, int],
) -> NoReturn:
    """A warm rank's life; ends the process. The first call came with the fork."""
    link.hello()
    try:
        group.join(spec, number, listen_fd)
        kept = _Kept(link, spec, number, streams)
        kept.baseline.begin()
    except BaseException as error:  # no group, no rank: the launch says why
        state, details = rank.describe(error)
        link.report(state, **details)
    else:
        kept.serve(call)
    link.wait_for_release()
    os._exit(0)


_OWN = ("RANK", "LOCAL_RANK", "MASTER_PORT", sweep.MARK)
"""Variables that a rank has of its own, whatever the launching process has under these names."""


class _Kept:
    """What a rank keeps between calls."""

    def __init__(
        self, link: rank.Link, spec: Mapping[str, Any], number: int, streams: Mapping[str, int]
    ) -> None:
        self._link, self._spec, self._number, self._streams = link, spec, number, streams
        self._folder = Path(spec["folder"]) / f"rank{number}"
        self._files = {name: _identity(os.fstat(fd)) for name, fd in streams.items()}
        self._modules, self._num_modules = frozenset(sys.modules), len(sys.modules)
        self._new_modules: list[str] = []
        self._traffic = dirt_torch.Traffic()
        gc.collect()
        gc.freeze()  # so that a collection after each call looks at what the call made, and takes 0.1 ms
        fixed = {**dirt_torch.probes(), **dirt_python.python()}
        self.baseline = dirt.Baseline(fixed, dirt_python.by_call())
        self._gpu_memory = dirt_torch.gpu_memory()

    def serve(self, call: bytes) -> None:
        """Until the launching process closes its side."""
        self._run(call)
        for header, body in self._link.requests():
            self._prepare(header)
            self._run(body)

    def _prepare(self, news: Mapping[str, Any]) -> None:
        """Everything that a new process would get from its parent; ``news`` is what has changed of it."""
        self._spec = {**self._spec, **news}
        self._empty_files()
        calls.start_anew()
        for name, value in news.get("environ", {}).items():
            if value is None and name not in _OWN:
                os.environ.pop(name, None)
            elif name not in _OWN:
                os.environ[name] = value
        if "sys_path" in news:
            sys.path[:] = news["sys_path"]
        if "argv" in news:
            sys.argv[:] = news["argv"]
        os.chdir(self._spec["cwd"])  # also if the name is the same: it may be another folder
        tempfile.tempdir = None  # it follows TMPDIR
        self.baseline.begin()
        peak.forget()

    def _empty_files(self) -> None:
        """What came after the last call's report was nobody's."""
        for name, fd in self._streams.items():
            status = None
            with contextlib.suppress(OSError):
                status = os.fstat(fd)
            if status is None or _identity(status) != self._files[name]:
                self._files[name] = _reopened(self._folder / name, fd)
            elif status.st_size:
                os.ftruncate(fd, 0)

    def _run(self, call: bytes) -> None:
        try:
            # A context of its own, so that context variables do not outlive the call.
            value, location = contextvars.copy_context().run(self._call, call)
            body = rank.pack(value, self._number)
            del value
            rank.flush()
            # Of the host the process's peak would be told, over all of its calls.
            found: dict[str, Any] = {"figures": self._traffic.figures(), "peak_bytes": peak.of_gpus()}
            found["dirt"] = self._left_running()
            self._link.report("passed", body, imported=self._imported(), location=location, **found)
        except BaseException as error:
            rank.flush()
            state, details = rank.describe(error)
            attached = getattr(error, rank.ATTACHED, b"")
            self._link.report(state, attached, peak_bytes=peak.of_gpus(), **details)
        else:
            self._link.at_rest(self.baseline.dirt())
        dirt_torch.renew()

    def _call(self, call: bytes) -> tuple[object, str | None]:
        target, args, kwargs = payload.unpack_call(call)
        with rank.tracing(self._spec, self._number):
            return recorder.called(target, args, kwargs)

    def _imported(self) -> list[str]:
        """What the ranks that come after these, should these be ended, need not import again."""
        if not self._number and len(sys.modules) != self._num_modules:
            self._num_modules = len(sys.modules)
            self._new_modules = libraries.imported(self._modules)
        return self._new_modules

    def _left_running(self) -> list[str]:
        # What waits for a collection (a generator, a pool) would act in somebody else's call. What the call
        # made is young: older objects are left to the collections that come by themselves.
        gc.collect(1)
        found = self._traffic.dirt() + self.baseline.left_running()
        return found + dirt_torch.gpu_dirt(self._gpu_memory)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _reopened(path: Path, number: int) -> tuple[int, int]:
    """Has a descriptor, which a function has closed or put to other use, write to its file again."""
    fd = os.open(path, output.FLAGS | os.O_TRUNC, 0o644)
    os.dup2(fd, number, inheritable=number < 3)
    os.close(fd)
    return _identity(os.fstat(number))
