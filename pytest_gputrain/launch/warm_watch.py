"""Watches one call of ranks that are there already: as any launch, but for how it begins and ends."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import surroundings, wire
from .member import Member
from .supervise import Supervision
from .verdict import Ending
from .warm_ranks import WarmRanks

SEND_DEADLINE = 30.0
"""Seconds for an idle rank to take a call."""


_OF_THE_CALL = ("sys_path", "argv", "cwd", "trace", "traces", "timeout", "stall")
"""What a rank is told with a call, if it is not what it was told last, besides changes of the environment."""


class Stale(Exception):
    """Ranks that died or stand still since their last call. Nobody has begun the new one."""


class WarmSupervision(Supervision):
    """One call: given to idle ranks by ``hand_over``, or to new ones by ``start``."""

    def __init__(self, ranks: WarmRanks, members: list[Member], spec: dict[str, Any]) -> None:
        super().__init__(ranks.server, members, spec, ranks.folder.path, ranks.selector)
        self.ranks = ranks
        self.told: Mapping[str, Any] = spec
        """What the ranks know once they have this call."""
        self.recycled: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the ranks are as they were before the call, and so can take another one."""
        return self._decided and self.recycled is None

    def hand_over(self, call: bytes) -> None:
        """Gives the call to ranks that wait for one. Raises Stale as long as none of them has it."""
        request = self._news()
        self.began = self._last_news = self._last_sample = time.monotonic()
        self._forked = True
        try:
            self._send(self.members[0], request, call)
        except OSError:
            raise Stale("the ranks died while idle") from None
        for member in self.members[1:]:
            with contextlib.suppress(OSError):  # from here on, what goes wrong is the call's
                self._send(member, request, call)

    def _news(self) -> dict[str, Any]:
        known = self.ranks.told
        news = {name: self._spec[name] for name in _OF_THE_CALL if self._spec[name] != known[name]}
        if change := surroundings.change(self._spec["environ"], known["environ"]):
            news["environ"] = change
        return news

    def _send(self, member: Member, request: dict[str, Any], call: bytes) -> None:
        assert member.sock is not None
        member.last_moved = self.began
        member.sock.settimeout(SEND_DEADLINE)
        try:
            wire.send(member.sock, request, call)
        finally:
            member.sock.setblocking(False)
            self._selector.modify(member.sock, selectors.EVENT_READ, member)

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
        """Closes this side of every socket, unless the ranks stay."""
        if not self.kept:
            super().close()


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
