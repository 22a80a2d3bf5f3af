"""Watches one call of ranks that are there already: as any launch, but for how it begins and ends."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from . import surroundings
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
        return self._connection.decided and self.recycled is None

    def hand_over(self, call: bytes) -> None:
        """Gives the call to ranks that wait for one. Raises Stale as long as none of them has it."""
        request = self._news()
        self._connection.resume()
        self._last_sample = self.began
        try:
            self._connection.hand(self.members[0], request, call, SEND_DEADLINE)
        except OSError:
            raise Stale("the ranks died while idle") from None
        for member in self.members[1:]:
            with contextlib.suppress(OSError):  # from here on, what goes wrong is the call's
                self._connection.hand(member, request, call, SEND_DEADLINE)

    def _news(self) -> dict[str, Any]:
        known = self.ranks.told
        news = {name: self._spec[name] for name in _OF_THE_CALL if self._spec[name] != known[name]}
        if change := surroundings.change(self._spec["environ"], known["environ"]):
            news["environ"] = change
        return news

    # -- the end ------------------------------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        """Lets the ranks be if they are clean; otherwise ends them as any launch's."""
        self.recycled = self._why_recycled(ending)
        if self.recycled is None:
            self._connection.decided = True
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
