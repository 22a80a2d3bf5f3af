"""A set of ranks that stay: their processes, their sockets, their folder, and what they were told last."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from . import client, process, sweep
from .client import ServerHandle
from .folder import Folder
from .member import Member
from .warm_folder import WarmFolder


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
        self._status: list[tuple[str, process.ProcFile]] = []

    def keep(self, members: Sequence[Member], told: Mapping[str, Any]) -> None:
        """They have served a call and are clean."""
        self.told = told
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
