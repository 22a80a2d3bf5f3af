"""Finds out, while a launch runs, whether some of its ranks can never go on: a certain hang.

Looks only when a rank has been quiet or has left, asks first for records (a millisecond, the rank's main
thread is not touched) and for stacks only if the records allow for a hang. Certain is what a second look,
half a second later, finds unchanged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import deadlock, observe, scene
from .deadlock import Scene
from .member import Member
from .verdict import Ending

QUIET = 0.3
"""Seconds without movement that make a rank worth a look."""
DESERTED_AFTER = 0.75
"""Seconds without movement or report before ranks that others have left count as stuck by their stacks."""
DEADLOCKED_AFTER = 5.0
"""The same where no rank has left: they may all wait for a slow network."""
SECOND_LOOK = 0.4
"""Seconds between looks; only what is the same then counts."""
LATER_LOOKS = 1.0
"""Seconds between looks at ranks that have been seen to be fine."""


class Lookout:
    """The looks at one launch, and what the last of them has seen."""

    def __init__(self, members: Sequence[Member], spec: dict[str, Any], folder: Path) -> None:
        self.scenes: dict[int, Scene] = {}
        self._members, self._folder = members, folder
        self._mark: str = spec["mark"]
        self._remote = bool(spec.get("remote_nodes"))
        self._busy_wait = spec.get("device") == "cuda"  # ranks that wait on NCCL use CPU all the same
        self._next_look = 0.0
        self._seen: list[Any] = []

    def look(self) -> dict[int, Scene]:
        """Asks every rank for its records; where they are is what their last stacks said."""
        self.scenes = scene.scenes(self._members, self._folder, self._mark)
        return self.scenes

    def nobody_can_go_on(self, last_news: float) -> Ending | None:
        """Whether a rank is stuck for ever. Not asked where ranks run on other hosts: they may still come."""
        now = time.monotonic()
        running = [member for member in self._members if not member.settled]
        if self._remote or now < self._next_look or any(member.pid is None for member in running):
            return None
        left = len(running) < len(self._members)
        quiet = [m for m in running if self._busy_wait or now - max(m.last_moved, last_news) > QUIET]
        if not quiet or (not left and len(self._members) > 1 and len(quiet) < 2 and not self._busy_wait):
            return None
        still = now - max(last_news, *(member.last_moved for member in running))
        patient = len(quiet) == len(running) and still > (DESERTED_AFTER if left else DEADLOCKED_AFTER)
        stuck = self._stuck(quiet, running, patient)
        self._next_look = time.monotonic() + (SECOND_LOOK if stuck else LATER_LOOKS)
        seen, self._seen = self._seen, deadlock.fingerprint(self.scenes, stuck)
        if not stuck or seen != self._seen:
            return None
        return "deserted" if left else "deadlocked"

    def _stuck(self, quiet: Sequence[Member], running: Sequence[Member], patient: bool) -> list[int]:
        """The stuck ranks: those of which records prove it, or, with patience, their stacks alone."""
        names = {member.rank for member in quiet}
        scenes = self.look()
        # As if every quiet rank waited: if nobody is stuck even then, no rank need be asked for its stack.
        # Being asked can disturb a rank (it cuts a C function's sleep short), so not without a reason.
        pretended = {
            rank: dataclasses.replace(
                seen,
                blocked=rank in names and (patient or bool(seen.pending()) or _maybe_in_a_message(seen)),
                waits_in=None,
                location=None,
            )
            for rank, seen in scenes.items()
        }
        if not deadlock.stuck(pretended):
            return []
        observe.dump(running, self._folder)
        scenes = self.look()
        for rank, seen in scenes.items():
            seen.blocked = seen.blocked and rank in names
        found = deadlock.stuck(scenes)
        return list(found) if patient or all(found.values()) else []


def _maybe_in_a_message(seen: Scene) -> bool:
    """Whether the last call was a ``send`` or ``recv``, of which no record says that it has come back."""
    return bool(seen.calls) and seen.calls[-1].seq is None
