"""A set of ranks that stay: their processes, their sockets, their folder, and what they were told last."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from . import client, process, sweep
from .aftermath import Aftermath
from .client import ServerHandle
from .folder import Folder
from .member import Member
from .warm_folder import WarmFolder

REST_DEADLINE = 30.0
"""Seconds for a rank to say what a call has left behind; it takes less than a millisecond."""


class WarmRanks:
    """Ranks, idle or with a call, and the server they descend from."""

    def __init__(
        self, key: Hashable, device: str, server: ServerHandle, mark: str, folder: WarmFolder
    ) -> None:
        self.key, self.device, self.server, self.mark, self.folder = key, device, server, mark, folder
        self.selector = selectors.DefaultSelector()
        self.socks: list[socket.socket] = []
        self.pids: list[int] = []
        self.told: Mapping[str, Any] = {}
        """What they know of the launch that they served last."""
        self.aftermath = Aftermath()
        """Of the launch that they served last."""
        self._status: list[tuple[str, process.ProcFile]] = []
        self._served: Sequence[Member] = ()
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def keep(self, members: Sequence[Member], told: Mapping[str, Any], wait: Callable[[], None]) -> None:
        """They have served a call and are clean, as far as they have told; ``wait`` settles the rest."""
        self.told, self._served, self.aftermath = told, members, Aftermath(wait=wait)
        if self.pids:
            return
        self.socks = [member.sock for member in members if member.sock is not None]
        self.pids = [member.pid for member in members if member.pid is not None]
        names = [("the process that forked the ranks", self.server.pid)]
        names += [(f"rank {rank} (pid {pid})", pid) for rank, pid in enumerate(self.pids)]
        self._status = [(name, process.ProcFile(f"/proc/{pid}/status")) for name, pid in names]

    def members(self) -> list[Member]:
        """These ranks as a call sees them."""
        members = [Member(rank, sock) for rank, sock in enumerate(self.socks)]
        for member, pid in zip(members, self.pids, strict=True):
            member.pid = pid
        return members

    def trouble(self) -> str | None:
        """Which process has died or stands still, or is about to: a signal on its way counts."""
        for name, status in self._status:
            if (state := process.trouble(status.read())) is not None:
                return f"{name} {state} while idle"
        return None

    def settle(self) -> str | None:
        """Why they cannot be used again: what the last call has left behind. Waits for ranks to say so."""
        with self._lock:
            trouble = None
            if not self.aftermath.settled and self._owner == os.getpid():
                found = [_rest_of(member) for member in self._served]
                dirty = [(rank, left) for rank, left in enumerate(found) if left]
                reason = f"rank {dirty[0][0]} left {'; '.join(dirty[0][1][:3])}" if dirty else None
                if None in found:
                    trouble = f"rank {found.index(None)} (pid {self.pids[found.index(None)]}) died while idle"
                self.aftermath.settle(reason)
            return self.aftermath.reason() or trouble

    def close(self) -> None:
        """Closes this side of all that there is to them. Harmless when it is closed."""
        self.selector.close()
        for sock in self.socks:
            sock.close()
        for _, status in self._status:
            status.close()

    def end(self) -> None:
        """Ends idle ranks, whatever they do. Their server goes on to serve other launches, if it can."""
        self.close()
        if self.server.end_launch():
            if self._served and self.aftermath.settled and self.aftermath.reason():
                # Others will be started for the next call: they need not import again what dirtied these.
                self.server.preload((self._served[0].report or {}).get("imported", []))
            self.folder.end()
            client.give_back(self.server)
        else:
            self.abandon(None)

    def abandon(self, folder: Folder | None) -> None:
        """Ends ranks of which nobody knows what they do, and their server. Their files go to ``folder``."""
        self.close()
        self.server.close()
        sweep.kill_marked(self.mark)
        if folder is None:
            self.folder.end()
        else:
            with contextlib.suppress(OSError):  # a full disk: what ended the launch matters more
                self.folder.hand_over(folder)


def _rest_of(member: Member) -> list[str] | None:
    """What a rank says that the last call left behind; None when it says nothing any more."""
    sock, reader = member.sock, member.reader
    assert sock is not None and reader is not None
    try:
        while member.rest is None:
            sock.settimeout(REST_DEADLINE)
            if not reader.read():
                return None
            for header, _ in reader.frames():
                member.at_rest(header)
        sock.setblocking(False)
    except OSError:  # too late, or closed meanwhile
        return None
    return member.rest
