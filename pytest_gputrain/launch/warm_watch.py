"""Watches one call of ranks that are there already: as any launch, but for how it begins and ends."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import wire
from .client import ServerHandle
from .errors import ServerLost
from .member import Member
from .supervise import Supervision
from .verdict import Ending

ANSWER_DEADLINE = 30.0
"""Seconds for idle ranks to take a call and answer; one that does not is stopped, or the machine is."""


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
        self._ready: set[int] = set()
        self._server_is_here = False

    @property
    def kept(self) -> bool:
        """Whether the ranks are as they were before the call, and so can take another one."""
        return self._decided and self.recycled is None

    def hand_over(self, call: bytes) -> None:
        """Gives the call to ranks that wait for one. Raises Stale as long as none of them has begun it."""
        self._selector.register(self.server.sock, 1, None)
        request = {name: self._spec[name] for name in _OF_THE_CALL}
        limit = time.monotonic() + min(ANSWER_DEADLINE, max(1.0, self._spec["timeout"]))
        try:
            temporary = self._spec["folder"] if self._spec["temporary"] else None
            wire.send(self.server.sock, {"op": "temporary", "folder": temporary, "answer": True})
            for member in self.members:
                self._send(member, request, call, limit)
            while not self._all_here() and time.monotonic() < limit:
                self._receive(0.05)
                self._look_for_dead()
        except (OSError, ServerLost):
            self._receive_what_is_there()
            self._look_for_dead()
            raise Stale("the ranks died while idle") from None
        if not self._all_here():
            silent = next((m for m in self.members if m.rank not in self._ready), None)
            if silent is None:
                raise Stale("the process that forked the ranks did not answer when the next call came")
            raise Stale(f"rank {silent.rank} (pid {silent.pid}) did not answer when the next call came")
        self._go()

    def _all_here(self) -> bool:
        return self._server_is_here and len(self._ready) == len(self.members)

    def _send(self, member: Member, request: dict[str, Any], call: bytes, limit: float) -> None:
        assert member.sock is not None
        member.sock.settimeout(max(0.01, limit - time.monotonic()))
        wire.send(member.sock, request, call)
        self._watch(member.sock, member)

    def _go(self) -> None:
        """Every rank is there: from here on, what goes wrong is the call's."""
        for member in self.members:
            member.last_moved = time.monotonic()
        self.began = self._last_news = self._last_sample = time.monotonic()
        self._forked = True
        for member in self.members:
            assert member.sock is not None
            with contextlib.suppress(OSError):  # the server tells that it died
                wire.send(member.sock, {"op": "go"})

    def _receive_what_is_there(self) -> None:
        with contextlib.suppress(OSError, ServerLost):
            self._receive_until(lambda: any(member.exit for member in self.members), 1.0)

    def _look_for_dead(self) -> None:
        for member in self.members:
            if (exit_ := member.exit) is not None:
                how = exit_["signal"] or f"exit code {exit_['exit_code']}"
                raise Stale(f"rank {member.rank} (pid {member.pid}) died while idle: {how}")

    def _rank_event(self, member: Member, header: dict[str, Any], body: bytes) -> None:
        super()._rank_event(member, header, body)
        if header["kind"] == "hello":
            self._ready.add(header["rank"])

    def _server_event(self, header: dict[str, Any]) -> None:
        super()._server_event(header)
        self._server_is_here |= header["event"] == "here"

    # -- the end ------------------------------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        """Lets the ranks be if they are clean; otherwise ends them as any launch's."""
        self.recycled = self._why_recycled(ending)
        if self.recycled is None:
            wire.send(self.server.sock, {"op": "temporary", "folder": None, "answer": False})
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
        if strangers := self._strangers():
            return f"child processes left running: {strangers}"
        return None

    def _strangers(self) -> list[int]:
        """Living processes that the server has adopted: what a rank has started and disowned."""
        own = {member.pid for member in self.members}
        return [pid for pid in self.server.children() if pid not in own]

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
