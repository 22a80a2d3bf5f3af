"""A rank that stays: runs one call after another in the same process and process group.

After each call it looks for what the function left behind and says so with its report. Whether it is used
again is decided by the launching process, which knows all ranks; a rank that is not wanted any more sees
the end of its socket and leaves.
"""

from __future__ import annotations

import contextvars
import gc
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from . import dirt, dirt_torch, output, payload, rank, recorder, sweep


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
        rank.join_group(spec, number, listen_fd)
        kept = _Kept(link, spec, number, streams)
        kept.baseline.begin()
    except BaseException as error:  # no group, no rank: the launch says why
        state, details = rank.describe(error)
        link.report(state, **details)
    else:
        kept.serve(call)
    link.wait_for_release()
    os._exit(0)


class _Kept:
    """What a rank keeps between calls."""

    def __init__(
        self, link: rank.Link, spec: Mapping[str, Any], number: int, streams: Mapping[str, int]
    ) -> None:
        self._link, self._spec, self._number, self._streams = link, spec, number, streams
        self._port = os.environ["MASTER_PORT"]
        self._modules, self._num_modules = frozenset(sys.modules), len(sys.modules)
        self._traffic = dirt_torch.Traffic()
        gc.collect()
        gc.freeze()  # so that a collection after each call looks at what the call made, and takes 0.1 ms
        fixed = {**dirt_torch.probes(), **dirt.python()}
        self.baseline = dirt.Baseline(fixed, dirt.by_call())
        self._gpu_memory = dirt_torch.gpu_memory()

    def serve(self, call: bytes) -> None:
        """Until the launching process closes its side."""
        self._run(call)
        for header, body in self._link.requests():
            self._prepare(header)
            self._run(body)

    def _prepare(self, header: Mapping[str, Any]) -> None:
        """Everything that a new process would get from its parent."""
        self._spec = header
        folder = Path(header["folder"]) / f"rank{self._number}"
        point_at(folder, self._streams)
        own = {"RANK": str(self._number), "LOCAL_RANK": str(self._number), "MASTER_PORT": self._port}
        _set_environment({**header["environ"], **own})
        recorder.place(str(folder), header["environ"][sweep.MARK], self._number)
        sys.path[:], sys.argv[:] = header["sys_path"], header["argv"]
        os.chdir(header["cwd"])
        tempfile.tempdir = None  # it follows TMPDIR
        self.baseline.begin()

    def _run(self, call: bytes) -> None:
        try:
            # A context of its own, so that context variables do not outlive the call.
            value, location = contextvars.copy_context().run(self._call, call)
            body = rank.pack(value, self._number)
            del value
            rank.flush()
            found = {"dirt": self._dirt(), "figures": self._traffic.figures()}
            self._link.report("passed", body, imported=self._imported(), location=location, **found)
        except BaseException as error:
            rank.flush()
            state, details = rank.describe(error)
            self._link.report(state, getattr(error, rank.ATTACHED, b""), **details)
        self._rest()

    def _call(self, call: bytes) -> tuple[object, str | None]:
        target, args, kwargs = payload.unpack_call(call)
        with rank.tracing(self._spec, self._number):
            return recorder.called(target, args, kwargs)

    def _imported(self) -> list[str]:
        """What the ranks that come after these, should these be ended, need not import again."""
        if self._number or len(sys.modules) == self._num_modules:
            return []
        return rank.imported_since(self._modules)

    def _dirt(self) -> list[str]:
        # What waits for a collection (a generator, a pool) would act in somebody else's call. What the call
        # made is young: older objects are left to the collections that come by themselves.
        gc.collect(1)
        found = self._traffic.dirt() + self.baseline.dirt()
        return found + dirt_torch.gpu_dirt(self._gpu_memory)

    def _rest(self) -> None:
        """Between calls nothing is written to the folder of the last one. What takes time is done now."""
        dirt_torch.renew()
        devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in self._streams.values():
            os.dup2(devnull, fd, inheritable=fd < 3)
        os.close(devnull)


def point_at(folder: Path, streams: Mapping[str, int]) -> None:
    """Has a rank's descriptors write to files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in streams.items():
        fd = os.open(f"{folder}/{name}", output.FLAGS, 0o644)
        os.dup2(fd, number, inheritable=number < 3)
        os.close(fd)


def _set_environment(wanted: Mapping[str, str]) -> None:
    """Makes the environment ``wanted``, touching only what differs."""
    now = dict(os.environ)
    for name in now.keys() - wanted.keys():
        del os.environ[name]
    for name, value in wanted.items():
        if now.get(name) != value:
            os.environ[name] = value
