"""While ranks run: whether it is over for all nodes, and how.

Words to node 0: event (its ranks came to something), scenes. Words of node 0 to all: look, end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import deadlock
from ..deadlock import Scene
from ..verdict import Ending
from . import telling
from .talk import Talk

STILL = 2.5
"""Seconds in which no rank of any node has moved before node 0 asks all of them where they are."""
PATIENCE = 10.0
"""Seconds after which stacks alone count, where no record proves a hang."""
LOOK_WITHIN = 7.5
"""Seconds for the other nodes to look at their ranks."""
SECOND_LOOK = 0.6
LAST_RESORT = 45.0
"""Seconds past the deadline in which node 0 has to say that it is over; then a node ends by itself."""
Look = Callable[[], dict[int, Any]]


class Deciding:
    """Asked several times a second by what supervises the ranks of this node."""

    def __init__(self, talk: Talk) -> None:
        self._talk, self._post = talk, talk.post
        self._events: dict[int, Ending] = {}
        self._told: Ending | None = None
        self._looks = 0
        self._next_look = self._next_beat = 0.0
        self._seen: list[Any] = []

    def decide(self, own: Ending | None, state: Mapping[str, Any], look: Look, late: float) -> Ending | None:
        """How it is over; None while it is not.

        ``own`` is what this node's ranks came to; ``state`` goes with the heartbeats; ``look`` looks at the
        ranks now; ``late`` is seconds past the deadline.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + 0.2
            self._post.beat({"launch": self._talk.launch, **state})
        self._post.pump()
        if not self._talk.leads:
            return self._follow(own, look, late)
        decided = self._lead(own, state, look)
        if decided is not None:
            self._talk.say("end", ending=decided)
        return decided

    def _follow(self, own: Ending | None, look: Look, late: float) -> Ending | None:
        talk = self._talk
        if own is not None and own != self._told:
            self._told = own
            talk.say("event", ending=own)
        for _, word in talk.words(("look", "end")):
            if word["kind"] == "end":
                ending: Ending = word["ending"]
                return ending
            talk.say("scenes", look=word["look"], scenes=list(look().values()))
        if talk.is_lost(0):
            return "failure"
        if late > LAST_RESORT:
            talk.lost[0] = f"{talk.name(0)} did not end the launch {late:.0f} s after its deadline"
            return "failure"
        return None

    def _lead(self, own: Ending | None, state: Mapping[str, Any], look: Look) -> Ending | None:
        for node, word in self._talk.words("event"):
            self._events[node] = word["ending"]
        if own is not None:
            self._events[0] = own
        bad = next((ending for ending in self._events.values() if ending != "complete"), None)
        if bad is not None:
            return bad
        gone = [node for node in self._post.others if self._talk.is_lost(node)]  # each is asked: it is named
        if gone:
            return "failure"
        if len(self._events) == self._post.where.nnodes:
            return "complete"
        return self._nobody_moves(state, look)

    def _nobody_moves(self, state: Mapping[str, Any], look: Look) -> Ending | None:
        states = [state, *(data for _, data in self._post.beats.values())]
        launch = self._talk.launch
        if len(states) < self._post.where.nnodes or any(
            one.get("launch", launch) != launch for one in states
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

    def _look_everywhere(self, look: Look) -> dict[int, Scene] | None:
        """All ranks of all nodes; None where a node did not answer."""
        self._looks += 1
        self._talk.say("look", look=self._looks)
        found = list(look().values())
        missing, limit = set(self._post.others), time.monotonic() + LOOK_WITHIN
        while missing and time.monotonic() < limit:
            for node, word in self._talk.words("scenes", 0.05):
                if word["look"] == self._looks:
                    found += word["scenes"]
                    missing.discard(node)
            missing -= {node for node in missing if self._talk.is_lost(node)}
        if missing or self._talk.lost:
            return None
        return {told["rank"]: telling.scene_told(told)[0] for told in found}
