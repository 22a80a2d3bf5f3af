"""One launch on several nodes: they meet, start together, tell node 0 how it stands, and end together.

Before ranks start: ``arriving``; while they run: ``deciding``; here: when it is over. Words to node 0:
report, taken. Words of node 0 to all: looked, verdict. Every wait has a bound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..records import RankResult
from . import telling
from .deciding import Deciding
from .post import Post
from .talk import Talk

ANSWER_WITHIN = 15.0
"""Seconds for the other nodes to answer, which look at their ranks meanwhile."""


class Meeting(Talk):
    """What the nodes of one launch say to each other, seen from this one.

    ``reports`` is what the others said about their ranks (node 0 only).
    """

    def __init__(self, post: Post, what: Mapping[str, Any]) -> None:
        super().__init__(post, what)
        self.reports: dict[int, dict[str, Any]] = {}
        self.decide = Deciding(self).decide

    def exchange(self, report: Mapping[str, Any]) -> None:
        """Tells node 0 about this node's ranks, before any is ended; returns when all have done so."""
        if not self.leads:
            self.say("report", **report)
            self._await("looked")
            return
        missing, limit = set(self.post.others) - set(self.lost), time.monotonic() + ANSWER_WITHIN
        while missing:
            for node, word in self.words("report", 0.05):
                self.reports[node] = word
                self.lost.pop(node, None)
                missing.discard(node)
            missing -= {node for node in missing if self.is_lost(node)}
            if missing and time.monotonic() > limit:
                for node in missing:
                    nothing = f"told nothing about its ranks for {ANSWER_WITHIN:.0f} s"
                    self.lost[node] = f"{self.name(node)} is alive but {nothing}"
                break
        self.say("looked")

    def _await(self, kind: str) -> dict[str, Any] | None:
        limit = time.monotonic() + ANSWER_WITHIN + self.post.lost_after
        while time.monotonic() < limit and not self.is_lost(0):
            for _, word in self.words(kind, 0.05):
                return word
        return None

    def tell_verdict(self, **verdict: Any) -> None:
        """Node 0's, for all; returns when they have it, since this process may end then."""
        self.say("verdict", **verdict)
        missing, limit = set(self.reports), time.monotonic() + ANSWER_WITHIN
        while missing and time.monotonic() < limit and not self.post.failed:
            missing -= {node for node, _ in self.words("taken", 0.05)}
            missing -= {node for node in missing if self.post.silence(node) > self.post.lost_after}

    def await_verdict(self) -> dict[str, Any] | None:
        """What node 0 makes of it; None where it is gone."""
        verdict = self._await("verdict")
        self.say("taken")
        if verdict is None:
            self.lost.setdefault(0, f"{self.name(0)} gave no verdict")
        return verdict

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
