"""Watches one launch to its end: reports, exits, progress, deadline. Every wait here has a bound."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import blame, observe
from .client import ServerHandle
from .connection import TICK, Connection
from .errors import LaunchCancelled, ServerLost
from .lookout import Lookout
from .member import Member
from .nodes import seen
from .nodes.meeting import Meeting
from .verdict import Ending

SAMPLE_EVERY = 0.25
GRACE = 1.0
"""Seconds that the other ranks of a function get, after a first failure, to report theirs."""
AGENT_GRACE = 4.0
"""Seconds that an elastic agent gets to notice a failure, end its workers and print what torchrun prints."""
RELEASE_DEADLINE = 10.0


class Supervision:
    """One launch, seen from the process that asked for it."""

    def __init__(
        self,
        server: ServerHandle,
        members: list[Member],
        spec: dict[str, Any],
        folder: Path,
        selector: selectors.BaseSelector | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        self.members, self.meeting = members, meeting
        self.leftovers: list[str] = []
        self.failed_agents: list[dict[str, Any]] = []
        self.server, self._spec, self._folder = server, spec, folder
        self._connection = Connection(server, members, spec, selector)
        self._last_sample = time.monotonic()
        self.lookout = Lookout(members, spec, folder)
        self.slow = ""
        self._state: dict[str, Any] = {}
        self._next_state = 0.0

    @property
    def began(self) -> float:
        """When the ranks were there, by the monotonic clock."""
        return self._connection.began

    def start(self, call: bytes) -> None:
        """Has the server fork the ranks. Raises ServerLost."""
        self._connection.start(call)

    def watch(self, cancelled: Callable[[], bool] | None = None) -> Ending:
        """Until there is a verdict to give. Raises ServerLost when the fork server dies, LaunchCancelled."""
        own: Ending | None = None
        while True:
            if cancelled is not None and cancelled():
                raise LaunchCancelled
            late = time.monotonic() - self.began - self._spec["timeout"]
            self._connection.receive(min(TICK, max(0.0, -late)) if late < 0 else TICK)
            own = own or self._ending()
            if self.meeting is None:
                if own is not None:
                    return own
            elif (decided := self._decided_by_all(self.meeting, own, late)) is not None:
                return decided

    def _ending(self) -> Ending | None:
        """What the ranks of this machine have come to; None while they may go on."""
        if all(member.settled for member in self.members):
            return "complete" if all(member.report for member in self.members) else "failure"
        if self._failed():
            self._grace()
            return "failure"
        self._sample()
        if time.monotonic() >= self.began + self._spec["timeout"]:
            return "deadline"
        if (stuck := self.lookout.nobody_can_go_on(self._connection.last_news)) is not None:
            return stuck
        # Where there are other machines, ranks that wait for theirs are still while those move.
        if self.meeting is None and self._connection.forked and self._still() > self._spec["stall"]:
            return "stalled"
        return None

    def _still(self) -> float:
        """Seconds since any running rank of this machine moved."""
        return time.monotonic() - max((member.last_moved for member in self._running()), default=0.0)

    def _decided_by_all(self, meeting: Meeting, own: Ending | None, late: float) -> Ending | None:
        if (now := time.monotonic()) >= self._next_state:
            self._next_state = now + SAMPLE_EVERY
            self._state = seen.state(self.members, self._folder)
        # Ranks that are done hold nobody up, and move no more.
        state = {
            **self._state,
            "still": self._still() if self._connection.forked else 0.0,
            "stall": self._spec["stall"],
        }
        decided = meeting.decide(own, state, self._look_for_all, late)
        if decided in ("complete", "failure") and meeting.leads and own is None:
            self._connection.receive(0.0)  # what its own ranks have said until now counts
        return decided

    def _look_for_all(self) -> dict[int, Any]:
        """Where the ranks of this machine are, in the form in which it travels."""
        observe.dump(self._running(), self._folder)
        return seen.scenes(self.lookout.look(), self.members, self._spec)

    def end(self, ending: Ending) -> None:
        """Lets ranks go that are done, ends all others and everything they started."""
        # From here on nothing counts: what a rank still does may be the effect of being asked or ended.
        self._connection.decided = ending != "complete"
        self.failed_agents = [agent for agent in self._connection.agent_exits if agent["exit_code"] != 0]
        if ending != "complete":
            self._look_closely(ending)
        elif any(member.echoes for member in self.members):
            self.lookout.look()
        if self.meeting is not None:
            self.meeting.exchange(seen.report(self, self._spec, self._folder))
        if ending == "complete" or not self._running():
            self._connection.release(RELEASE_DEADLINE)
        else:
            self._connection.command("terminate")
            self._connection.receive_until(self._connection.all_exited, 0.5)
        self._connection.command("end")
        self._connection.receive_until(lambda: self._connection.ended is not None, 30.0)
        if self._connection.ended is None:
            raise ServerLost("the launch could not be ended in 30 s")
        if ending == "complete":
            self.leftovers = self._connection.ended["leftovers"]

    def close(self) -> None:
        """Closes this side of every socket."""
        self._connection.close()

    def _running(self) -> list[Member]:
        return [member for member in self.members if not member.settled]

    def _failed(self) -> bool:
        if self._connection.agents_exited():
            return True
        return self._connection.restarts_left <= 0 and any(member.failed for member in self.members)

    def _grace(self) -> None:
        """Gives the other ranks time to fail as well, so that the earliest can be told from the rest."""
        if self._spec["kind"] == "script":
            self._connection.receive_until(self._connection.agents_exited, AGENT_GRACE)
            return
        began, limit = time.monotonic(), time.monotonic() + GRACE
        while self._running() and time.monotonic() < limit:
            self._connection.receive(TICK)
            self._sample()
            still = time.monotonic() - max((m.last_moved for m in self._running()), default=0.0)
            if min(still, time.monotonic() - began) > 2 * SAMPLE_EVERY:
                return

    def _sample(self) -> None:
        now = time.monotonic()
        if now - self._last_sample < SAMPLE_EVERY:
            return
        self._last_sample = now
        observe.sample(self._running(), self._folder, now)

    def _look_closely(self, ending: Ending) -> None:
        """Stacks of what still runs, and whether it moves: before it is ended."""
        running = self._running()
        # Those two were decided by a look that is to be shown.
        if self.meeting is not None or ending not in ("deserted", "deadlocked"):
            observe.dump(running, self._folder)
            self.lookout.look()
        if ending != "deadline":
            return
        vain = blame.waits_in_vain(self.lookout.scenes)
        recent = min(1.0, self._spec["timeout"] / 2)
        for member in running:
            member.moving = time.monotonic() - member.last_moved < recent and member.rank not in vain
            member.waits_in_vain = member.rank in vain
            member.settle_down()
        self.slow = observe.most_time([member for member in running if member.moving], self._folder)
        self._last_sample = 0.0
        began = time.monotonic() - SAMPLE_EVERY
        self._sample()
        for member in running:
            member.moving = member.moving or member.last_moved >= began
