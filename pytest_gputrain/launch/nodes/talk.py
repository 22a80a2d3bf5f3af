"""The words of one launch between its nodes, and which of them can still be heard.

Each word carries the number of the launch, so that nothing of an earlier one counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .post import Post


class Talk:
    """What this node says and hears in one launch.

    ``hosts`` by node; ``lost`` says of nodes that went away how.
    """

    def __init__(self, post: Post, what: Mapping[str, Any]) -> None:
        self.post, self.what = post, dict(what)
        post.launches += 1
        self.launch = post.launches
        self.hosts: dict[int, str] = {}
        self.lost: dict[int, str] = {}

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
        return int(self.what["nproc"]) * self.post.where.nnodes

    # -- words --------------------------------------------------------------------------------------

    def say(self, kind: str, **rest: Any) -> None:
        """To node 0, or from node 0 to all."""
        self.post.say({"kind": kind, "launch": self.launch, **rest})

    def words(self, kinds: str | tuple[str, ...], timeout: float = 0.0) -> list[tuple[int, dict[str, Any]]]:
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

    # -- who is there -------------------------------------------------------------------------------

    def is_lost(self, node: int) -> bool:
        """Whether a node is gone; ``lost`` then says how."""
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
