"""The last resort when the fork server itself was killed: ends what still carries the launch's mark."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

import psutil

MARK = "GPUTRAIN_LAUNCH"
"""Environment variable with the launch's own random id; every rank and what it starts inherits it."""


def mark(spec: dict[str, Any]) -> str:
    """Gives a launch an id, which its ranks have in their environment."""
    spec["mark"] = uuid.uuid4().hex
    spec["environ"] = {**spec["environ"], MARK: spec["mark"]}
    return str(spec["mark"])


def kill_marked(mark: str) -> None:
    """SIGKILL to every process whose environment carries this launch's id.

    Only needed without the fork server, which knows its descendants. The id is random: nothing else is hit.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                process.kill()
