"""``isolation="warm"``: ranks and their process group are kept for the next launch of the same kind.

Ranks are used again only if the call passed on all of them and left nothing behind (``dirt``); else they
are ended as those of any launch, at once, and the next launch gets new ones. So no launch can spoil
another. Each set of ranks has a fork server of its own, which ends with this process, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import client, sweep
from .client import ServerHandle
from .conclude import concluded
from .member import Member
from .result import LaunchResult
from .warm_watch import Stale, WarmSupervision

MOST_IDLE_RANKS = 16
"""Idle ranks kept, over all pools; each holds about 60 MB of its own, and on CUDA a context."""
GROUP_TIMEOUT = 24 * 3600.0
"""Seconds for an operation of a kept group: later than the deadline of any launch that may use it."""

_READ_AT_START = (
    "TORCH", "PYTORCH", "NCCL_", "GLOO_", "CUDA_", "NVIDIA_", "UCX_", "FI_", "TZ", "LANG", "LC_",
)  # fmt: skip
"""Variables that only a new process, a new CUDA context or a new process group reads (see client, too)."""


@dataclass(frozen=True)
class WarmRanks:
    """Ranks that wait for a call, and the server they descend from."""

    key: Hashable
    device: str
    server: ServerHandle
    mark: str
    socks: list[socket.socket]
    pids: list[int]

    def members(self) -> list[Member]:
        """These ranks as a call sees them."""
        members = [Member(rank, sock) for rank, sock in enumerate(self.socks)]
        for member, pid in zip(members, self.pids, strict=True):
            member.pid = pid
        return members

    def end(self) -> None:
        """Ends the ranks, whatever they do. Their server goes on to serve other launches, if it can."""
        for sock in self.socks:
            sock.close()
        if self.server.end_launch():
            client.give_back(self.server)
            return
        self.server.close()
        sweep.kill_marked(self.mark)


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


def key_of(spec: dict[str, Any]) -> Hashable:
    """What ranks must have in common with a launch to serve it: all that they read when they started.

    The search path for modules too: a name that was imported must mean the same module.
    """
    environ = spec["environ"]
    read = tuple(sorted(item for item in environ.items() if item[0].startswith(_READ_AT_START)))
    start = client.start_key(environ)
    return spec["world_size"], spec["device"], spec["backend"], start, read, tuple(spec["sys_path"])


def watched(spec: dict[str, Any], call: bytes, folder: Path) -> LaunchResult:
    """One warm launch. Whatever happens, nothing of it runs afterwards but clean, idle ranks.

    Raises ServerLost when the fork server died during it.
    """
    start_environ = spec.pop("start_environ")
    key = key_of(spec)
    supervision = _resumed(key, spec, call, folder) or _started(start_environ, spec, call, folder)
    server, mark = supervision.server, spec["environ"][sweep.MARK]
    in_order = False
    try:
        ending = supervision.watch()
        seconds = time.monotonic() - supervision.began
        supervision.end(ending)
        result = concluded(supervision, "function", ending, seconds, folder)
        if not result.passed:
            reason = f"{result.verdict}: {result.cause}"
            if supervision.kept:
                supervision.recycle(reason)
            supervision.recycled = reason
        in_order = True
    finally:
        supervision.close()
        if not in_order:  # KeyboardInterrupt, a timeout's exception, a dead server
            server.close()
            sweep.kill_marked(mark)
    _hand_back(supervision, key, spec["device"], mark)
    result.recycled = supervision.recycled
    return result


def _hand_back(supervision: WarmSupervision, key: Hashable, device: str, mark: str) -> None:
    if supervision.recycled is None:
        pids = [member.pid or 0 for member in supervision.members]
        POOL.put(WarmRanks(key, device, supervision.server, mark, supervision.sockets(), pids))
    else:
        POOL.recycled.append(supervision.recycled)
        supervision.server.preload((supervision.members[0].report or {}).get("imported", []))
        client.give_back(supervision.server)


def _resumed(key: Hashable, spec: dict[str, Any], call: bytes, folder: Path) -> WarmSupervision | None:
    """The call in the hands of idle ranks, or None if there are none that can take it."""
    while (ranks := POOL.take(key)) is not None:
        # One mark for all calls: it is in the ranks' environment as the kernel shows it.
        mine = {**spec, "environ": {**spec["environ"], sweep.MARK: ranks.mark}}
        supervision = WarmSupervision(ranks.server, ranks.members(), mine, folder)
        try:
            supervision.hand_over(call)
        except Stale as stale:
            POOL.recycled.append(str(stale))
            supervision.close()
            ranks.end()
        except BaseException:  # KeyboardInterrupt
            supervision.close()
            ranks.end()
            raise
        else:
            spec["environ"] = mine["environ"]
            return supervision
    return None


def _started(
    start_environ: dict[str, str], spec: dict[str, Any], call: bytes, folder: Path
) -> WarmSupervision:
    """The call in the hands of new ranks."""
    server = client.borrow(start_environ)
    members = [Member(rank) for rank in range(spec["world_size"])]
    supervision = WarmSupervision(server, members, {**spec, "group_timeout": GROUP_TIMEOUT}, folder)
    try:
        supervision.start(call)
    except BaseException:
        supervision.close()
        server.close()
        sweep.kill_marked(spec["environ"][sweep.MARK])
        raise
    return supervision


def shutdown() -> None:
    """Ends every idle rank and fork server of this process. Called at exit; safe to call at any time."""
    POOL.close()
    client.shutdown()


atexit.register(POOL.close)
