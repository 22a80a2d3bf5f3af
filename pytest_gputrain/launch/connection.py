"""What goes to the fork server and the ranks of one launch, and what they say: exits, reports, restarts."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from . import wire
from .client import ServerHandle
from .errors import ServerLost
from .member import Member

TICK = 0.05


class Connection:
    """One launch's sockets. What comes in is taken down here and in ``members``."""

    def __init__(
        self,
        server: ServerHandle,
        members: list[Member],
        spec: dict[str, Any],
        selector: selectors.BaseSelector | None = None,
    ) -> None:
        self.server, self.members, self._spec = server, members, spec
        self._selector = selector or selectors.DefaultSelector()
        self._agents: dict[int, socket.socket] = {}
        self._agent_pids: list[int] = []
        self._exited_pids: set[int] = set()
        self.agent_exits: list[dict[str, Any]] = []
        self.ended: dict[str, Any] | None = None
        """The server's last word on this launch: all that it started is gone."""
        self.decided = False
        """Whether nothing that a rank says counts any more."""
        self.restarts_left = spec.get("max_restarts", 0)
        self.began = self.last_news = time.monotonic()
        self.forked = False

    # -- what goes out ------------------------------------------------------------------------------

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

    def resume(self) -> None:
        """The ranks are there already, and are about to be given a call: from now on what they say counts."""
        self.began = self.last_news = time.monotonic()
        self.forked = True

    def hand(self, member: Member, request: dict[str, Any], call: bytes, within: float) -> None:
        """Gives a call to a rank that waits for one. Raises OSError where it does not take it in time."""
        assert member.sock is not None
        member.last_moved = self.began
        member.sock.settimeout(within)
        try:
            wire.send(member.sock, request, call)
        finally:
            member.sock.setblocking(False)
            self._selector.modify(member.sock, selectors.EVENT_READ, member)

    def command(self, op: str) -> None:
        """Has the server do something with all that it has started for this launch. Raises ServerLost."""
        try:
            wire.send(self.server.sock, {"op": op})
        except OSError:
            raise self._lost() from None

    def release(self, within: float) -> None:
        """Lets ranks go that are done, and waits for their exits."""
        for member in self.members:
            if member.sock:
                with contextlib.suppress(OSError):
                    member.sock.shutdown(socket.SHUT_WR)
        self.receive_until(self.all_exited, within)

    def close(self) -> None:
        """Closes this side of every socket."""
        self._selector.close()
        for sock in [*self._agents.values(), *(member.sock for member in self.members if member.sock)]:
            sock.close()

    def _lost(self) -> ServerLost:
        return ServerLost(f"the process that forks the ranks died: {self.server.last_words()}")

    # -- what comes in ------------------------------------------------------------------------------

    def all_exited(self) -> bool:
        """Whether all that the server forked for this launch is gone."""
        pids = self._agent_pids or [member.pid for member in self.members if member.pid]
        return self._exited_pids.issuperset(pids)

    def agents_exited(self) -> bool:
        """Whether no elastic agent of a script runs any more; False for a function, which has none."""
        return bool(self._agent_pids) and len(self.agent_exits) == len(self._agent_pids)

    def receive_until(self, done: Callable[[], bool], within: float) -> None:
        """Takes what comes in until ``done()``, for so many seconds at most."""
        limit = time.monotonic() + within
        while not done() and time.monotonic() < limit:
            self.receive(TICK)

    def receive(self, timeout: float) -> None:
        """Takes what comes in, waiting so many seconds for it at most. Raises ServerLost."""
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
        if self.decided:
            return
        self.last_news = time.monotonic()
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
            self.restarts_left = self._spec.get("max_restarts", 0) - header["restart"]
        elif header["kind"] == "rest":
            member.at_rest(header)
        elif header["restart"] == member.restart:
            member.reported(header, body)

    def _server_event(self, header: dict[str, Any]) -> None:
        if header["event"] == "started":
            # The clock starts here: a server that is still importing is no rank standing still.
            self.began, self.last_news, self.forked = header["at"], header["at"], True
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
                if member.pid == header["pid"] and self._spec["kind"] == "function" and not self.decided:
                    self._read(member)
                    member.exited(header)
            if header["pid"] in self._agent_pids:
                self.agent_exits.append(header)
        elif header["event"] == "ended":
            self.ended = header

    def _by_rank(self, rank: int) -> Member | None:
        return next((member for member in self.members if member.rank == rank), None)
