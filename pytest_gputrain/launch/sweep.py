"""The last resort when the fork server itself was killed: ends what still carries the launch's mark."""

from __future__ import annotations

from contextlib import suppress

import psutil

MARK = "GPUTRAIN_LAUNCH"
"""Environment variable with the launch's own random id; every rank and what it starts inherits it."""


def kill_marked(mark: str) -> None:
    """SIGKILL to every process whose environment carries this launch's id.

    Only needed without the fork server, which knows its descendants. The id is random: nothing else is hit.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                process.kill()
