"""Before any rank starts: all nodes of a launch are there, and were started alike.

Words to node 0: hello, cannot. Words of node 0 to all: go, refuse, absent.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from ..errors import LaunchUsageError
from .alike import differs, never_arrived
from .talk import Talk

_MORE = 30.0
"""Seconds that a node waits beyond the launch's timeout, in which node 0 has to speak."""


class NodeAbsent(Exception):
    """A node never came; one line, with the time waited and the way out."""


def arrive(talk: Talk, within: float) -> None:
    """Until all nodes are there and agree. Raises LaunchUsageError where they do not, NodeAbsent."""
    began = time.monotonic()
    while talk.post.number is None:
        talk.post.pump(0.1)
        if talk.post.failed:
            raise (LaunchUsageError if talk.post.misused else NodeAbsent)(talk.post.failed)
        if time.monotonic() - began > within + _MORE:
            raise NodeAbsent(talk.post.no_answer(within + _MORE))
    mine = {**talk.what, "host": socket.gethostname()}
    talk.hosts[talk.number] = mine["host"]
    if talk.leads:
        _gather(talk, mine, began, within)
    else:
        talk.say("hello", what=mine)
        _await_go(talk, began, within)


def _gather(talk: Talk, mine: dict[str, Any], began: float, within: float) -> None:
    missing = set(talk.post.others)
    while missing:
        for node, word in talk.words(("hello", "cannot"), 0.05):
            if (why := _refused(talk, mine, node, word)) is not None:
                talk.say("refuse", why=why)
                raise LaunchUsageError(why)
            missing.discard(node)
        _check(talk, missing & set(talk.post.beats))
        if missing and (waited := time.monotonic() - began) > within:
            here = ", ".join(f"node {node} ({host})" for node, host in sorted(talk.hosts.items()))
            where = talk.post.where
            why = never_arrived(sorted(missing), where.nnodes, where.endpoint, waited, here)
            talk.say("absent", why=why)
            raise NodeAbsent(why)
    talk.say("go", hosts=list(talk.hosts.items()))


def _refused(talk: Talk, mine: dict[str, Any], node: int, word: dict[str, Any]) -> str | None:
    if word["kind"] == "cannot":
        return f"node {node} ({word['host']}) cannot take part: {word['why']}"
    talk.hosts[node] = word["what"]["host"]
    return differs(mine, node, word["what"])


def _await_go(talk: Talk, began: float, within: float) -> None:
    while True:
        for _, word in talk.words(("go", "refuse", "absent"), 0.05):
            if word["kind"] == "refuse":
                raise LaunchUsageError(word["why"])
            if word["kind"] == "absent":
                raise NodeAbsent(word["why"])
            talk.hosts |= {int(node): host for node, host in word["hosts"]}
            return
        _check(talk, {0})
        if time.monotonic() - began > within + _MORE:
            raise NodeAbsent(f"node 0 did not start the launch within {within + _MORE:.0f} s")


def _check(talk: Talk, nodes: set[int]) -> None:
    """That those can still be heard. Raises NodeAbsent."""
    if talk.post.failed:
        raise NodeAbsent(talk.post.failed)
    for node in sorted(nodes):
        if (silence := talk.post.silence(node)) > talk.post.lost_after:
            raise NodeAbsent(
                f"{talk.name(node)} has not been heard of for {silence:.0f} s, before any rank started"
            )
