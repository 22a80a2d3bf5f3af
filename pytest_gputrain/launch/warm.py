"""``isolation="warm"``: ranks and their process group are kept for the next launch of the same kind.

Ranks are used again only if the call passed on all of them and left nothing behind (``dirt``); else they
are ended as those of any launch, at once, and the next launch gets new ones. So no launch can spoil
another. Each set of ranks has a fork server of its own, which ends with this process, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from . import client, sweep
from .aftermath import Aftermath
from .conclude import concluded
from .folder import Folder
from .member import Member
from .nodes import post
from .result import LaunchResult
from .surroundings import reads
from .warm_folder import WarmFolder
from .warm_ranks import WarmRanks
from .warm_watch import Stale, WarmSupervision

MOST_IDLE_RANKS = 16
"""Idle ranks kept, over all pools; each holds about 60 MB of its own, and on CUDA a context."""
GROUP_TIMEOUT = 24 * 3600.0
"""Seconds for an operation of a kept group: later than the deadline of any launch that may use it."""

_READ_AT_START = (
    "TORCH", "PYTORCH", "NCCL_", "GLOO_", "CUDA_", "NVIDIA_", "UCX_", "FI_", "TZ", "LANG", "LC_",
)  # fmt: skip
"""Variables that only a new process, a new CUDA context or a new process group reads (see client, too)."""


class WarmPool:
    """The idle ranks of this process. Ranks in use are in nobody's hands but their launch's."""

    def __init__(self) -> None:
        self.recycled: deque[str] = deque(maxlen=100)
        """Why ranks were ended, the latest last."""
        self._idle: list[WarmRanks] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def take(self, key: Hashable) -> WarmRanks | None:
        """Idle ranks of this kind, which are then the caller's."""
        with self._lock:
            if self._pid != os.getpid():  # forked: they are the parent's
                self._idle, self._pid = [], os.getpid()
            for ranks in reversed(self._idle):
                if ranks.key == key:
                    self._idle.remove(ranks)
                    return ranks
        return None

    def put(self, ranks: WarmRanks) -> None:
        """Takes back clean ranks; ends those unused for longest when there are too many."""
        surplus = []
        with self._lock:
            self._idle.append(ranks)
            while len(self._idle) > 1 and sum(len(idle.pids) for idle in self._idle) > MOST_IDLE_RANKS:
                surplus.append(self._idle.pop(0))
        for old in surplus:
            self.recycled.append(f"unused for longest of more than {MOST_IDLE_RANKS} idle ranks")
            old.end()

    def settle(self, ranks: WarmRanks) -> None:
        """Finds out whether ranks can be used again, and ends them if not."""
        with self._lock:
            if idle := ranks in self._idle:
                self._idle.remove(ranks)
        reason = ranks.settle()
        if idle and reason is None:
            self.put(ranks)
        elif idle:
            self.recycled.append(str(reason))
            ranks.end()

    def pids(self) -> list[int]:
        """Processes of the idle ranks."""
        with self._lock:
            return [pid for ranks in self._idle for pid in ranks.pids]

    def close(self, device: str | None = None) -> None:
        """Ends all idle ranks, or those on ``device`` alone."""
        with self._lock:
            idle = self._idle if self._pid == os.getpid() else []
            closing = [ranks for ranks in idle if device in (None, ranks.device)]
            self._idle = [ranks for ranks in idle if ranks not in closing]
        for ranks in closing:
            with contextlib.suppress(OSError):
                ranks.end()


POOL = WarmPool()


def _is_read_at_start(name: str) -> bool:
    return name.startswith(_READ_AT_START) or client.is_read_at_start(name)


@reads(_is_read_at_start)
def _start_key(environ: Mapping[str, str]) -> Hashable:
    read = tuple(sorted(item for item in environ.items() if item[0].startswith(_READ_AT_START)))
    return client.start_key(environ), read


def key_of(spec: dict[str, Any]) -> Hashable:
    """What ranks must have in common with a launch to serve it: all that they read when they started.

    The search path for modules too: a name that was imported must mean the same module.
    """
    start = _start_key(spec["environ"])
    return spec["world_size"], spec["device"], spec["backend"], start, tuple(spec["sys_path"])


def watched(spec: dict[str, Any], call: bytes, folder: Folder) -> LaunchResult:
    """One warm launch. Whatever happens, nothing of it runs afterwards but clean, idle ranks.

    Raises ServerLost when the fork server died during it.
    """
    start_environ = spec.pop("start_environ")
    key = key_of(spec)
    # Tracers write to the launch's own folder, by name; nothing else is written by default.
    spec["traces"] = str(folder.path()) if spec["trace"] is not None else None
    supervision = _resumed(key, spec, call) or _started(key, start_environ, spec, call)
    ranks = supervision.ranks
    in_order = False
    try:
        ending = supervision.watch()
        seconds = time.monotonic() - supervision.began
        supervision.end(ending)
        result = concluded(supervision, "function", ending, seconds, ranks.folder.path, folder)
        if not result.passed:
            reason = f"{result.verdict}: {result.cause}"
            if supervision.kept:
                supervision.recycle(reason)
            supervision.recycled = reason
        in_order = True
    finally:
        supervision.close()
        if not in_order:  # KeyboardInterrupt, a timeout's exception, a dead server
            ranks.abandon(folder)
    _hand_back(supervision, result)
    return result


def _hand_back(supervision: WarmSupervision, result: LaunchResult) -> None:
    """The files to the result, and the ranks, if they stay, to the pool."""
    ranks = supervision.ranks
    if supervision.recycled is not None:
        result.aftermath = Aftermath(supervision.recycled)
        POOL.recycled.append(supervision.recycled)
        ranks.close()
        ranks.server.preload((supervision.members[0].report or {}).get("imported", []))
        client.give_back(ranks.server)
        ranks.folder.hand_over(result.folder)
        return
    ranks.keep(supervision.members, supervision.told, partial(POOL.settle, ranks))
    result.aftermath = ranks.aftermath
    try:
        ranks.folder.hand_out(result.folder, printed=any(rank.output for rank in result.ranks))
    except BaseException:  # a full disk
        ranks.end()
        raise
    POOL.put(ranks)


def _resumed(key: Hashable, spec: dict[str, Any], call: bytes) -> WarmSupervision | None:
    """The call in the hands of idle ranks, or None if there are none that can take it."""
    while (ranks := POOL.take(key)) is not None:
        if (reason := ranks.trouble() or ranks.settle()) is not None:
            POOL.recycled.append(reason)
            ranks.end()
            continue
        # One mark for all calls: it is in the ranks' environment as the kernel shows it.
        supervision = WarmSupervision(ranks, ranks.members(), {**spec, "mark": ranks.mark})
        try:
            supervision.hand_over(call)
        except Stale as stale:
            POOL.recycled.append(str(stale))
            ranks.end()
        except BaseException:  # KeyboardInterrupt
            ranks.end()
            raise
        else:
            return supervision
    return None


def _started(
    key: Hashable, start_environ: dict[str, str], spec: dict[str, Any], call: bytes
) -> WarmSupervision:
    """The call in the hands of new ranks."""
    server = client.borrow(start_environ)
    folder = WarmFolder(spec["world_size"])
    own = {"folder": str(folder.path), "temporary": True, "group_timeout": GROUP_TIMEOUT}
    marked = {**spec, **own}
    ranks = WarmRanks(key, spec["device"], server, sweep.mark(marked), folder)
    supervision = WarmSupervision(ranks, [Member(rank) for rank in range(spec["world_size"])], marked)
    supervision.told = spec
    try:
        supervision.start(call)
    except BaseException:
        supervision.close()
        ranks.abandon(None)
        raise
    return supervision


def shutdown() -> None:
    """Ends every idle rank and fork server of this process. Called at exit; safe to call at any time."""
    POOL.close()
    client.shutdown()
    post.shutdown()


atexit.register(POOL.close)
