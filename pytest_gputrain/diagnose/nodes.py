"""A plan on several machines: node 0 decides which phase comes next, the others run their part of each.

A node that is not node 0 runs nothing but the program of its own command line. Of node 0 it takes a phase's
name, its number of steps, and switches (``GPUTRAIN_*``) that this package knows. Words to node 0: here,
cannot, bye. Words of node 0 to all: phase (one that it runs alone, too: its silence has a bound), over.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.diagnose import environment
from pytest_gputrain.diagnose.programs import Script
from pytest_gputrain.diagnose.records import Phase
from pytest_gputrain.launch import LaunchUsageError
from pytest_gputrain.launch.nodes import alike, post

if TYPE_CHECKING:
    from pytest_gputrain.diagnose.run import Settings

_SWITCHES = frozenset(
    f"GPUTRAIN_{name}"
    for name in (
        "BACKEND", "DDP_FIND_UNUSED", "DDP_NO_SYNC", "DDP_STATIC_GRAPH", "FORCE_BRANCH", "GC_RANGE",
        "GRAD_DIGEST", "SEED",
    )
)  # fmt: skip
"""What makes a phase what it is. Others name places of a machine, or are its user's to set."""
_BETWEEN = 120.0
"""Seconds beyond a launch's own in which node 0 has to say what comes next."""


class CannotMeet(ValueError):
    """The plan cannot begin on all machines; one line. ``usage``: by bad input."""

    def __init__(self, why: str, *, usage: bool) -> None:
        super().__init__(why)
        self.usage = usage


class Session:
    """This machine's part in a plan over several."""

    def __init__(self, program: Script, within: float, why_not: Callable[[int], str]) -> None:
        """Comes to the endpoint, and on node 0 waits for all others. Raises CannotMeet.

        why_not: why this machine cannot be node so and so; empty where it can.
        """
        assert program.where is not None
        self.where, self._within = program.where, within
        self._post = post.borrow(self.where, within)
        began = time.monotonic()
        while self._post.number is None:
            self._post.pump(0.1)
            if self._post.failed:
                raise CannotMeet(self._post.failed, usage=self._post.misused)
            if (waited := time.monotonic() - began) > within + 30:
                raise CannotMeet(self._post.no_answer(waited), usage=False)
        self._heard, self._came = time.monotonic(), set[int]()
        mine = alike.what(self.where.nnodes, program.nproc, program.path, program.module)
        mine["host"] = socket.gethostname()
        own = why_not(self.number)
        if self.leads:
            self._gather(mine, own, began)
            return
        self._post.say({"kind": "here", "what": mine, "why_not": own})
        if own:
            time.sleep(0.3)  # until it is on its way
            raise CannotMeet(own, usage=True)

    @property
    def number(self) -> int:
        """This node's."""
        assert self._post.number is not None
        return self._post.number

    @property
    def leads(self) -> bool:
        """Whether this is node 0."""
        return self._post.leads

    # -- node 0 -------------------------------------------------------------------------------------

    def _gather(self, mine: Mapping[str, Any], own: str, began: float) -> None:
        missing, why = set(self._post.others), own
        while missing and not why:
            self._post.pump(0.1)
            for node, word in self._taken("here"):
                missing.discard(node)
                self._came.add(node)
                theirs, cannot = word["what"], word["why_not"]
                refused = f"node {node} ({theirs['host']}): {cannot}" if cannot else ""
                why = why or refused or alike.differs(mine, node, theirs) or ""
            if missing and not why and ((waited := time.monotonic() - began) > self._within or self.gone()):
                absent = alike.never_arrived(sorted(missing), self.where.nnodes, self.where.endpoint, waited)
                self._call_off(self.gone() or absent, usage=False)
        if why:
            self._call_off(why, usage=True)

    def _call_off(self, why: str, *, usage: bool) -> None:
        self.over(2 if usage else 1, why)
        raise CannotMeet(why, usage=usage)

    def announce(self, phase: Phase) -> None:
        """Has the other nodes run their part of a phase, which this one launches next."""
        self._post.say({"kind": "phase", "name": phase.name, "alone": phase.alone, "steps": phase.steps,
                        "switches": dict(phase.switches), "before": self._post.launches})  # fmt: skip

    def gone(self) -> str:
        """Why no phase over all nodes can run any more; empty while it can."""
        self._post.pump()
        if self._post.failed:
            return f"the nodes do not hear of each other any more ({self._post.failed})"
        known = self._post.others if not self.leads else sorted(self._came)
        lost = [node for node in known if self._post.silence(node) > self._post.lost_after]
        return f"node {lost[0]} has not been heard of for {self._post.silence(lost[0]):.0f} s" if lost else ""

    def over(self, code: int, headline: str) -> None:
        """Tells the others what the plan came to; waits a moment, so that they get it."""
        self._post.say({"kind": "over", "code": code, "headline": headline})
        missing, limit = set(self._came), time.monotonic() + 5.0
        while missing and time.monotonic() < limit and not self._post.failed:
            self._post.pump(0.1)
            missing -= {node for node, _ in self._taken("bye")}
            missing -= {node for node in missing if self._post.silence(node) > self._post.lost_after}

    # -- the others ---------------------------------------------------------------------------------

    def follow(self, program: Script, settings: Settings, tell: Callable[[str], None]) -> int:
        """Runs this node's part of each phase until node 0 says what the plan came to; the exit code.

        Raises CannotMeet where node 0 calls it off for bad input.
        """
        me = f"node {self.number} of {self.where.nnodes}"
        while True:
            self._post.pump(0.2)
            for _, word in self._taken("phase", "over"):
                if word["kind"] == "over":
                    self._post.say({"kind": "bye"})
                    time.sleep(0.3)  # until it is on its way
                    if (code := int(word["code"])) == 2:
                        raise CannotMeet(str(word["headline"]), usage=True)
                    tell(f"{me}: {word['headline']} (node 0 has the report)")
                    return code
                if not word["alone"]:
                    self._part(word, program, settings, tell)
                self._heard = time.monotonic()
            if lost := self.gone() or self._silent(settings):
                tell(f"{me}: lost node 0 at {self.where.endpoint}: {lost}")
                return 1

    def _silent(self, settings: Settings) -> str:
        """Its courier may live while it stands still."""
        waited = time.monotonic() - self._heard
        late = waited > max(self._within, settings.launch.timeout) + _BETWEEN
        return f"it has not said for {waited:.0f} s what comes next" if late else ""

    def _taken(self, *kinds: str) -> list[tuple[int, dict[str, Any]]]:
        found = [one for one in self._post.words if one[1]["kind"] in kinds]
        self._post.words.clear()
        return found

    def _part(
        self, word: Mapping[str, Any], program: Script, settings: Settings, tell: Callable[[str], None]
    ) -> None:
        phase = told_phase(word, program.nproc)
        self._post.launches = before = int(word["before"])
        folder = settings.out / f"{before + 1:02d}-{phase.name.replace(':', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        on_top = environment.added(os.environ, phase.switches, device=settings.device)
        on_top["GPUTRAIN_STUDY"] = str(folder.absolute())
        try:
            result = replace(program, session=None).launch(phase, settings.launcher(folder), on_top)
        except LaunchUsageError as error:
            tell(f"{phase.name:20} could not be launched: {error}")
            host = socket.gethostname()
            self._post.say({"kind": "cannot", "launch": before + 1, "host": host, "why": str(error)})
            return
        tell(f"{phase.name:20} {result.verdict!s:8} {result.seconds:6.1f} s  ranks of node {self.number}")


def told_phase(word: Mapping[str, Any], ranks: int) -> Phase:
    """The phase that node 0 has announced: known switches alone, and a name that can be a folder's."""
    name, steps = re.sub(r"[^\w:-]", "_", str(word["name"]))[:100], word["steps"]
    kept = {name: str(value) for name, value in word["switches"].items() if name in _SWITCHES}
    return Phase(name, "", "program", ranks, None if steps is None else int(steps), kept)


def folder_of(out: Path, number: int) -> Path:
    """Where a node writes: node 0 where it was told to, another beside it, as machines may share files."""
    return out if number == 0 else out.with_name(f"{out.name}-node{number}")
