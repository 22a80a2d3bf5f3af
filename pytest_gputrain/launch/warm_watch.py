"""Watches one call of ranks that are there already: as any launch, but for how it begins and ends."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import process, wire
from .client import ServerHandle
from .member import Member
from .supervise import Supervision
from .verdict import Ending

SEND_DEADLINE = 30.0
"""Seconds for an idle rank to take a call."""


_OF_THE_CALL = ("folder", "environ", "sys_path", "argv", "cwd", "trace", "timeout", "stall")
"""What a rank is told with each call; the rest of a launch it knows since it was started."""


class Stale(Exception):
    """Ranks that died or stand still since their last call. Nobody has begun the new one."""


class WarmSupervision(Supervision):
    """One call: given to idle ranks by ``hand_over``, or to new ones by ``start``."""

    def __init__(
        self, server: ServerHandle, members: list[Member], spec: dict[str, Any], folder: Path
    ) -> None:
        super().__init__(server, members, spec, folder)
        self.recycled: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the ranks are as they were before the call, and so can take another one."""
        return self._decided and self.recycled is None

    def hand_over(self, call: bytes) -> None:
        """Gives the call to ranks that wait for one. Raises Stale as long as none of them has it."""
        self._look_for_dead()
        request = {name: self._spec[name] for name in _OF_THE_CALL}
        self._selector.register(self.server.sock, selectors.EVENT_READ, None)
        self.began = self._last_news = self._last_sample = time.monotonic()
        self._forked = True
        try:
            if self._spec["temporary"]:
                wire.send(self.server.sock, {"op": "temporary", "folder": self._spec["folder"]})
            self._send(self.members[0], request, call)
        except OSError:
            raise Stale("the ranks died while idle") from None
        for member in self.members[1:]:
            with contextlib.suppress(OSError):  # from here on, what goes wrong is the call's
                self._send(member, request, call)

    def _send(self, member: Member, request: dict[str, Any], call: bytes) -> None:
        assert member.sock is not None
        member.last_moved = self.began
        member.sock.settimeout(SEND_DEADLINE)
        try:
            wire.send(member.sock, request, call)
        finally:
            self._watch(member.sock, member)

    def _look_for_dead(self) -> None:
        """Raises Stale for processes that have died or are about to: a signal on its way counts."""
        if (state := process.trouble(self.server.pid)) is not None:
            raise Stale(f"the process that forked the ranks {state} while idle")
        for member in self.members:
            if (state := process.trouble(member.pid or 0)) is not None:
                raise Stale(f"rank {member.rank} (pid {member.pid}) {state} while idle")

    # -- the end ------------------------------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        """Lets the ranks be if they are clean; otherwise ends them as any launch's."""
        self.recycled = self._why_recycled(ending)
        if self.recycled is None:
            self._decided = True
        else:
            super().end(ending)

    def recycle(self, reason: str) -> None:
        """Ends ranks that ``end`` has kept."""
        self.recycled = reason
        super().end("complete")

    def _why_recycled(self, ending: Ending) -> str | None:
        reports = [member.report or {} for member in self.members]
        if ending != "complete" or any(report.get("state") != "passed" for report in reports):
            return "the launch did not pass"
        for member, report in zip(self.members, reports, strict=True):
            if report["dirt"]:
                return f"rank {member.rank} left {'; '.join(report['dirt'][:3])}"
        if dirt := between([report["figures"] for report in reports]):
            return dirt[0]
        if any(member.exit for member in self.members):
            return "a rank died after its report"
        if strangers := self.server.strangers([member.pid for member in self.members if member.pid]):
            return f"child processes left running: {strangers}"
        return None

    def close(self) -> None:
        """Closes this side of every socket; those of ranks that stay are left open."""
        if self.kept:
            self._selector.close()
        else:
            super().close()

    def sockets(self) -> list[socket.socket]:
        """The ranks' sockets, by rank."""
        return [member.sock for member in self.members if member.sock is not None]


def between(figures: Sequence[Mapping[str, int]]) -> list[str]:
    """What the figures of all ranks say that none of them can know. Pure."""
    found = []
    for name in ("collectives", "groups"):
        counts = [figure.get(name, 0) for figure in figures]
        if len(set(counts)) > 1:
            said = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
            found.append(f"{name}: not the same number on all ranks ({said})")
    if sum(figure.get("balance", 0) for figure in figures) != 0:
        found.append("point-to-point operations: what was sent and what was received differ in number")
    return found
