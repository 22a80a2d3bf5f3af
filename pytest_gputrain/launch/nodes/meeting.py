"""One launch on several nodes: they meet, start together, tell node 0 how it stands, and end together.

Words to node 0: hello, event (its ranks came to something), scenes, report, taken. Words of node 0 to all:
go, refuse, absent, look, end, looked, verdict. Each carries the number of the launch, so that nothing of an
earlier one counts. Every wait has a bound.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import deadlock
from ..deadlock import Scene
from ..errors import LaunchUsageError
from ..records import RankResult
from ..verdict import Ending
from . import telling
from .post import Post

PROTOCOL = 1
"""Of the words between nodes; one that says another number is not understood."""
STILL = 2.5
"""Seconds in which no rank of any node has moved before node 0 asks all of them where they are."""
PATIENCE = 10.0
"""Seconds after which stacks alone count, where no record proves a hang."""
ANSWER_WITHIN = 15.0
"""Seconds for the other nodes to answer, which look at their ranks meanwhile."""
SECOND_LOOK = 0.6
LAST_RESORT = 45.0
"""Seconds past the deadline in which node 0 has to say that it is over; then a node ends by itself."""
_SAME = ("nnodes", "nproc", "script", "sha256", "version")


class NodeAbsent(Exception):
    """A node never came; one line, with the time waited and the way out."""


class Meeting:
    """What the nodes of one launch say to each other, seen from this one.

    ``hosts`` by node; ``ranks_of`` by node, as far as known; ``lost`` says of nodes that went away how;
    ``reports`` what the others said about their ranks (node 0 only).
    """

    def __init__(self, post: Post, what: Mapping[str, Any]) -> None:
        self.post, self._what = post, dict(what)
        post.launches += 1
        self.launch = post.launches
        self.hosts: dict[int, str] = {}
        self.lost: dict[int, str] = {}
        self.reports: dict[int, dict[str, Any]] = {}
        self.verdict: dict[str, Any] | None = None
        self._events: dict[int, Ending] = {}
        self._told: Ending | None = None
        self._looks = 0
        self._next_look = self._next_beat = 0.0
        self._seen: list[Any] = []
        self._decided: Ending | None = None

    @property
    def number(self) -> int:
        """This node's."""
        assert self.post.number is not None
        return self.post.number

    @property
    def leads(self) -> bool:
        """Whether this is node 0, whose verdict counts for all."""
        return self.post.leads

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return int(self._what["nproc"]) * self.post.where.nnodes

    # -- before ranks start -------------------------------------------------------------------------

    def open(self, within: float) -> None:
        """Until all nodes are there and agree. Raises LaunchUsageError where they do not, NodeAbsent."""
        began = time.monotonic()
        while self.post.number is None:
            self.post.pump(0.1)
            if self.post.failed:
                raise (LaunchUsageError if self.post.misused else NodeAbsent)(self.post.failed)
            if time.monotonic() - began > within + 30:
                raise NodeAbsent(f"the courier between the nodes did not start within {within + 30:.0f} s")
        mine = {**self._what, "host": socket.gethostname()}
        self.hosts[self.number] = mine["host"]
        if self.leads:
            self._gather(mine, began, within)
        else:
            self._say("hello", what=mine)
            self._await_go(began, within)

    def _gather(self, mine: dict[str, Any], began: float, within: float) -> None:
        missing = set(self.post.others)
        while missing:
            for node, word in self._words("hello", 0.05):
                theirs = word["what"]
                self.hosts[node] = theirs["host"]
                missing.discard(node)
                if (why := differs(mine, node, theirs)) is not None:
                    self._say("refuse", why=why)
                    raise LaunchUsageError(why)
            self._check_courier()
            if missing and time.monotonic() - began > within:
                why = self._absent(sorted(missing), time.monotonic() - began)
                self._say("absent", why=why)
                raise NodeAbsent(why)
        self._say("go", hosts=list(self.hosts.items()))

    def _absent(self, missing: list[int], waited: float) -> str:
        names = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(map(str, missing))}"
        here = ", ".join(f"node {node} ({host})" for node, host in sorted(self.hosts.items()))
        return (
            f"{names} never arrived: waited {waited:.0f} s at {self.post.where.endpoint} for "
            f"{self.post.where.nnodes} nodes, {here} came; start the same command there with --node-rank "
            f"{missing[0]}, or look for a firewall between the machines"
        )

    def _await_go(self, began: float, within: float) -> None:
        while True:
            for _, word in self._words(("go", "refuse", "absent"), 0.05):
                if word["kind"] == "refuse":
                    raise LaunchUsageError(word["why"])
                if word["kind"] == "absent":
                    raise NodeAbsent(word["why"])
                self.hosts |= {int(node): host for node, host in word["hosts"]}
                return
            self._check_courier()
            if (silence := self.post.silence(0)) > self.post.lost_after:
                raise NodeAbsent(
                    f"{self.name(0)} has not been heard of for {silence:.0f} s, before any rank started"
                )
            if time.monotonic() - began > within + 30:
                raise NodeAbsent(f"node 0 did not start the launch within {within + 30:.0f} s")

    def _check_courier(self) -> None:
        if self.post.failed:
            raise NodeAbsent(self.post.failed)

    # -- while ranks run ----------------------------------------------------------------------------

    def decide(
        self, own: Ending | None, state: Mapping[str, Any], look: Callable[[], dict[int, Any]], late: float
    ) -> Ending | None:
        """Whether it is over for all nodes, and how. Asked several times a second.

        ``own`` is what this node's ranks came to; ``state`` goes with the heartbeats; ``look`` looks at the
        ranks now; ``late`` is seconds past the deadline.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + 0.2
            self.post.beat({"launch": self.launch, **state})
        self.post.pump()
        if self.leads:
            self._decided = self._lead(own, state, look)
            if self._decided is not None:
                self._say("end", ending=self._decided)
            return self._decided
        return self._follow(own, look, late)

    def _follow(self, own: Ending | None, look: Callable[[], dict[int, Any]], late: float) -> Ending | None:
        if own is not None and own != self._told:
            self._told = own
            self._say("event", ending=own)
        for _, word in self._words(("look", "end")):
            if word["kind"] == "end":
                ending: Ending = word["ending"]
                return ending
            self._say("scenes", look=word["look"], scenes=list(look().values()))
        if self._is_lost(0):
            return "failure"
        if late > LAST_RESORT:
            self.lost[0] = f"{self.name(0)} did not end the launch {late:.0f} s after its deadline"
            return "failure"
        return None

    def _lead(
        self, own: Ending | None, state: Mapping[str, Any], look: Callable[[], dict[int, Any]]
    ) -> Ending | None:
        for node, word in self._words("event"):
            self._events[node] = word["ending"]
        if own is not None:
            self._events[0] = own
        bad = next((ending for ending in self._events.values() if ending != "complete"), None)
        if bad is not None:
            return bad
        gone = [node for node in self.post.others if self._is_lost(node)]  # each is asked: it is named
        if gone:
            return "failure"
        if len(self._events) == self.post.where.nnodes:
            return "complete"
        return self._nobody_moves(state, look)

    def _nobody_moves(self, state: Mapping[str, Any], look: Callable[[], dict[int, Any]]) -> Ending | None:
        states = [state, *(data for _, data in self.post.beats.values())]
        if len(states) < self.post.where.nnodes or any(
            one.get("launch", self.launch) != self.launch for one in states
        ):
            return None
        still = min(float(one.get("still", 0.0)) for one in states)
        if still > state["stall"]:
            return "stalled"
        now = time.monotonic()
        if still < STILL or now < self._next_look:
            return None
        scenes = self._look_everywhere(look)
        if scenes is None:
            return None
        found = deadlock.stuck(scenes)
        certain = bool(found) and (still > PATIENCE or all(found.values()))
        self._next_look = time.monotonic() + (SECOND_LOOK if certain else max(STILL, still))
        seen, self._seen = self._seen, deadlock.fingerprint(scenes, found)
        if not certain or seen != self._seen:
            return None
        left = any(scene.state != "running" for scene in scenes.values())
        return "deserted" if left else "deadlocked"

    def _look_everywhere(self, look: Callable[[], dict[int, Any]]) -> dict[int, Scene] | None:
        """All ranks of all nodes; None where a node did not answer."""
        self._looks += 1
        self._say("look", look=self._looks)
        found = list(look().values())
        missing, limit = set(self.post.others), time.monotonic() + ANSWER_WITHIN / 2
        while missing and time.monotonic() < limit:
            for node, word in self._words("scenes", 0.05):
                if word["look"] == self._looks:
                    found += word["scenes"]
                    missing.discard(node)
            missing -= {node for node in missing if self._is_lost(node)}
        if missing or self.lost:
            return None
        return {told["rank"]: telling.scene_told(told)[0] for told in found}

    def _is_lost(self, node: int) -> bool:
        if node not in self.lost and (silence := self.post.silence(node)) > self.post.lost_after:
            at = time.strftime("%H:%M:%S", time.localtime(time.time() - silence))
            heard = f"no heartbeat since {at} ({silence:.1f} s)"
            self.lost[node] = f"{self.name(node)} vanished{self._progress(node)}: {heard}"
        if node not in self.lost and self.post.failed:
            self.lost[node] = f"{self.name(node)} cannot be reached any more: {self.post.failed}"
        return node in self.lost

    def _progress(self, node: int) -> str:
        data = self.post.beats.get(node, (0.0, {}))[1]
        return f" {data['since']:.1f} s after step {data['step']}" if data.get("step") is not None else ""

    def ranks_of(self, node: int) -> list[int]:
        """The ranks of another node, as far as its heartbeats have told."""
        data = self.post.beats.get(node, (0.0, {}))[1]
        return list(data.get("ranks", ())) if data.get("launch") == self.launch else []

    def name(self, node: int) -> str:
        """``node 1 (host-b, ranks 4-7)``."""
        from ..output import rank_list

        known = [self.hosts.get(node, ""), rank_list(self.ranks_of(node)) if self.ranks_of(node) else ""]
        known = [part for part in known if part]
        return f"node {node} ({', '.join(known)})" if known else f"node {node}"

    # -- when it is over ----------------------------------------------------------------------------

    def exchange(self, report: Mapping[str, Any]) -> None:
        """Tells node 0 about this node's ranks, before any is ended; returns when all have done so."""
        if not self.leads:
            self._say("report", **report)
            self._await("looked")
            return
        missing, limit = set(self.post.others) - set(self.lost), time.monotonic() + ANSWER_WITHIN
        while missing:
            for node, word in self._words("report", 0.05):
                self.reports[node] = word
                self.lost.pop(node, None)
                missing.discard(node)
            missing -= {node for node in missing if self._is_lost(node)}
            if missing and time.monotonic() > limit:
                for node in missing:
                    nothing = f"told nothing about its ranks for {ANSWER_WITHIN:.0f} s"
                    self.lost[node] = f"{self.name(node)} is alive but {nothing}"
                break
        self._say("looked")

    def _await(self, kind: str) -> dict[str, Any] | None:
        limit = time.monotonic() + ANSWER_WITHIN + self.post.lost_after
        while time.monotonic() < limit and not self._is_lost(0):
            for _, word in self._words(kind, 0.05):
                return word
        return None

    def tell_verdict(self, **verdict: Any) -> None:
        """Node 0's, for all; returns when they have it, since this process may end then."""
        self._say("verdict", **verdict)
        missing, limit = set(self.reports), time.monotonic() + ANSWER_WITHIN
        while missing and time.monotonic() < limit and not self.post.failed:
            missing -= {node for node, _ in self._words("taken", 0.05)}
            missing -= {node for node in missing if self.post.silence(node) > self.post.lost_after}

    def await_verdict(self) -> dict[str, Any] | None:
        """What node 0 makes of it; None where it is gone."""
        self.verdict = self._await("verdict")
        self._say("taken")
        if self.verdict is None:
            self.lost.setdefault(0, f"{self.name(0)} gave no verdict")
        return self.verdict

    def remote_ranks(self) -> list[RankResult]:
        """The ranks of the other nodes: reported ones, and those that went with their node."""
        found: list[RankResult] = []
        for node in self.post.others:
            host = self.hosts.get(node)
            if node in self.reports:
                ranks = [telling.rank_told(told) for told in self.reports[node]["ranks"]]
            else:
                gone = f"gone with node {node}" + (f" ({host})" if host else "")
                ranks = [RankResult(rank, "ended", fate=gone) for rank in self.ranks_of(node)]
            for rank in ranks:
                rank.node, rank.host = node, host
            found += ranks
        return found

    # -- words --------------------------------------------------------------------------------------

    def _say(self, kind: str, **rest: Any) -> None:
        self.post.say({"kind": kind, "launch": self.launch, **rest})

    def _words(self, kinds: str | tuple[str, ...], timeout: float = 0.0) -> list[tuple[int, dict[str, Any]]]:
        """Takes this launch's words of these kinds, in order; drops those of earlier launches."""
        if timeout:
            self.post.pump(timeout)
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        queue = self.post.words
        found: list[tuple[int, dict[str, Any]]] = []
        left: list[tuple[int, dict[str, Any]]] = []
        for node, word in queue:
            launch = word.get("launch", self.launch)
            if launch == self.launch and word["kind"] in kinds:
                found.append((node, word))
            elif launch >= self.launch:  # an earlier launch's has come too late
                left.append((node, word))
        queue.clear()
        queue.extend(left)
        return found


def differs(mine: Mapping[str, Any], node: int, theirs: Mapping[str, Any]) -> str | None:
    """In one line, what two nodes were not started alike with."""
    for name in _SAME:
        if mine[name] != theirs[name]:
            here, there = f"node 0 ({mine['host']})", f"node {node} ({theirs['host']})"
            if name == "sha256":
                return f"{mine['script']} is another text on {here} than on {there}; copy it to every machine"
            what = "pytest-gputrain's protocol" if name == "version" else name
            values = f"{what} is {mine[name]} on {here} and {theirs[name]} on {there}"
            return f"{values}; start the same command on every machine"
    return None
