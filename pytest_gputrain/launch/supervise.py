"""Watches one launch to its end: reports, exits, progress, deadline. Every wait here has a bound."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import blame, observe, wire
from .client import ServerHandle
from .errors import LaunchCancelled, ServerLost
from .lookout import Lookout
from .member import Member
from .nodes import seen
from .nodes.meeting import Meeting
from .verdict import Ending

TICK = 0.05
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
        self.agent_exits: list[dict[str, Any]] = []
        self.failed_agents: list[dict[str, Any]] = []
        self.server, self._spec, self._folder = server, spec, folder
        self._selector = selector or selectors.DefaultSelector()
        self._agents: dict[int, socket.socket] = {}
        self._agent_pids: list[int] = []
        self._exited_pids: set[int] = set()
        self._ended: dict[str, Any] | None = None
        self._decided = False
        self._restarts_left = spec.get("max_restarts", 0)
        self.began = self._last_news = self._last_sample = time.monotonic()
        self._forked = False
        self.lookout = Lookout(members, spec, folder)
        self.slow = ""
        self._state: dict[str, Any] = {}
        self._next_state = 0.0

    # -- start and end ------------------------------------------------------------------------------

    def start(self, call: bytes) -> None:
        """Has the server fork the ranks. Raises ServerLost."""
        theirs: list[socket.socket] = []
        per_node = self._spec.get("nproc", len(self.members))
        for number, member in enumerate(self.members):
            if self._spec["kind"] == "script" and number % per_node == 0:
                agent_end, far = socket.socketpair()
                self._agents[number // per_node] = agent_end
                self._watch(agent_end, Member(-1, agent_end))
                theirs.append(far)
            member.sock, far = socket.socketpair()
            member.reader = wire.Reader(member.sock)
            self._watch(member.sock, member)
            theirs.append(far)
        self._selector.register(self.server.sock, selectors.EVENT_READ, None)
        try:
            wire.send(self.server.sock, self._spec, call, [sock.fileno() for sock in theirs])
        except OSError:
            raise self._lost() from None
        finally:
            for far in theirs:
                far.close()

    def _watch(self, sock: socket.socket, member: Member) -> None:
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, member)

    def watch(self, cancelled: Callable[[], bool] | None = None) -> Ending:
        """Until there is a verdict to give. Raises ServerLost when the fork server dies, LaunchCancelled."""
        own: Ending | None = None
        while True:
            if cancelled is not None and cancelled():
                raise LaunchCancelled
            late = time.monotonic() - self.began - self._spec["timeout"]
            self._receive(min(TICK, max(0.0, -late)) if late < 0 else TICK)
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
        if (stuck := self.lookout.nobody_can_go_on(self._last_news)) is not None:
            return stuck
        # Where there are other machines, ranks that wait for theirs are still while those move.
        if self.meeting is None and self._forked and self._still() > self._spec["stall"]:
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
        state = {**self._state, "still": self._still() if self._forked else 0.0, "stall": self._spec["stall"]}
        decided = meeting.decide(own, state, self._look_for_all, late)
        if decided in ("complete", "failure") and meeting.leads and own is None:
            self._receive(0.0)  # what its own ranks have said until now counts
        return decided

    def _look_for_all(self) -> dict[int, Any]:
        """Where the ranks of this machine are, in the form in which it travels."""
        observe.dump(self._running(), self._folder)
        return seen.scenes(self.lookout.look(), self.members, self._spec)

    def end(self, ending: Ending) -> None:
        """Lets ranks go that are done, ends all others and everything they started."""
        # From here on nothing counts: what a rank still does may be the effect of being asked or ended.
        self._decided = ending != "complete"
        self.failed_agents = [agent for agent in self.agent_exits if agent["exit_code"] != 0]
        if ending != "complete":
            self._look_closely(ending)
        elif any(member.echoes for member in self.members):
            self.lookout.look()
        if self.meeting is not None:
            self.meeting.exchange(seen.report(self, self._spec, self._folder))
        if ending == "complete" or not self._running():
            self._release()
        else:
            self._command("terminate")
            self._receive_until(self._all_exited, 0.5)
        self._command("end")
        self._receive_until(lambda: self._ended is not None, 30.0)
        if self._ended is None:
            raise ServerLost("the launch could not be ended in 30 s")
        if ending == "complete":
            self.leftovers = self._ended["leftovers"]

    def close(self) -> None:
        """Closes this side of every socket."""
        self._selector.close()
        for sock in [*self._agents.values(), *(member.sock for member in self.members if member.sock)]:
            sock.close()

    def _release(self) -> None:
        for member in self.members:
            if member.sock:
                with contextlib.suppress(OSError):
                    member.sock.shutdown(socket.SHUT_WR)
        self._receive_until(self._all_exited, RELEASE_DEADLINE)

    def _all_exited(self) -> bool:
        """Whether all that the server forked for this launch is gone."""
        pids = self._agent_pids or [member.pid for member in self.members if member.pid]
        return self._exited_pids.issuperset(pids)

    def _command(self, op: str) -> None:
        try:
            wire.send(self.server.sock, {"op": op})
        except OSError:
            raise self._lost() from None

    def _lost(self) -> ServerLost:
        return ServerLost(f"the process that forks the ranks died: {self.server.last_words()}")

    # -- what comes in ------------------------------------------------------------------------------

    def _receive_until(self, done: Any, within: float) -> None:
        limit = time.monotonic() + within
        while not done() and time.monotonic() < limit:
            self._receive(TICK)

    def _receive(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                if not self.server.reader.read():
                    raise self._lost()
                for header, _body in self.server.reader.frames():
                    self._server_event(header)
            else:
                self._read(key.data)

    def _read(self, member: Member) -> None:
        """Takes all that a rank (or agent) has sent so far."""
        sock = member.sock
        assert sock is not None and member.reader is not None
        got = wire.CHUNK
        while got == wire.CHUNK:  # less was all there was
            before = member.reader.received
            if not member.reader.read():
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(sock)
                break
            got = member.reader.received - before
        for header, body in member.reader.frames():
            self._rank_event(member, header, body)

    def _rank_event(self, member: Member, header: dict[str, Any], body: bytes) -> None:
        if self._decided:
            return
        self._last_news = time.monotonic()
        if header["kind"] == "exit":
            target = self._by_rank(header["rank"])
            if target and header["restart"] == target.restart:
                self._read(target)  # its report may still be on the way
                target.exited(header)
            return
        if header["kind"] == "hello":
            # Which node gets which ranks is the rendezvous's choice.
            if (other := self._by_rank(header["rank"])) is not None:
                other.rank = member.rank
            member.hello(header)
            self._restarts_left = self._spec.get("max_restarts", 0) - header["restart"]
        elif header["kind"] == "rest":
            member.at_rest(header)
        elif header["restart"] == member.restart:
            member.reported(header, body)

    def _server_event(self, header: dict[str, Any]) -> None:
        if header["event"] == "started":
            # The clock starts here: a server that is still importing is no rank standing still.
            self.began, self._last_news, self._forked = header["at"], header["at"], True
            for member in self.members:
                member.last_moved = max(member.last_moved, self.began)
            if self._spec["kind"] == "script":
                self._agent_pids = header["pids"]
            else:
                for member, pid in zip(self.members, header["pids"], strict=True):
                    member.pid = pid
        elif header["event"] == "exit":
            self._exited_pids.add(header["pid"])
            for member in self.members:
                if member.pid == header["pid"] and self._spec["kind"] == "function" and not self._decided:
                    self._read(member)
                    member.exited(header)
            if header["pid"] in self._agent_pids:
                self.agent_exits.append(header)
        elif header["event"] == "ended":
            self._ended = header

    def _by_rank(self, rank: int) -> Member | None:
        return next((member for member in self.members if member.rank == rank), None)

    # -- what it means ------------------------------------------------------------------------------

    def _running(self) -> list[Member]:
        return [member for member in self.members if not member.settled]

    def _failed(self) -> bool:
        if self._agent_pids and len(self.agent_exits) == len(self._agent_pids):
            return True
        return self._restarts_left <= 0 and any(member.failed for member in self.members)

    def _grace(self) -> None:
        """Gives the other ranks time to fail as well, so that the earliest can be told from the rest."""
        if self._spec["kind"] == "script":
            self._receive_until(lambda: len(self.agent_exits) == len(self._agent_pids), AGENT_GRACE)
            return
        began, limit = time.monotonic(), time.monotonic() + GRACE
        while self._running() and time.monotonic() < limit:
            self._receive(TICK)
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
        if self.meeting is not None or ending not in (
            "deserted",
            "deadlocked",
        ):  # those were decided by a look that is to be shown
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
