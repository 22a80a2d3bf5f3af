"""The one call that a rank makes: tracing around the user's code, as its launch has asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_gputrain.trace.session import Session
from pytest_gputrain.trace.switches import Switches


def install(record: Mapping[str, Any], folder: Path, rank: int, *, watchdog_seconds: float) -> Session:
    """Traces from now on, into files in ``folder``; the handle's ``remove()`` takes everything off again.

    record: ``Switches.as_record()``.
    """
    return Session(Switches.from_record(record), folder, rank, watchdog_seconds).install()


@contextlib.contextmanager
def installed(
    record: Mapping[str, Any] | None, folder: Path, rank: int, *, watchdog_seconds: float
) -> Iterator[None]:
    """Traces meanwhile; nothing is touched where ``record`` is None.

    Raises SwitchError at the end of code that ended well, if a switch that was to change it found nothing.
    """
    if record is None:
        yield
        return
    session = install(record, folder, rank, watchdog_seconds=watchdog_seconds)
    try:
        yield
    except SystemExit as error:
        if not error.code:
            session.rewiring.require_effect()
        raise
    else:
        session.rewiring.require_effect()
    finally:
        session.remove()
