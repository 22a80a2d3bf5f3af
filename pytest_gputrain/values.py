"""What a user may write for a number, the same on the command line, in the environment and in an ini file."""

from __future__ import annotations

import math

LEGAL_SECONDS = "a number of seconds above 0"


def parse_seconds(text: str) -> float:
    """Return ``text`` in seconds. Raises ``ValueError`` when it is not above 0, or is not a finite number."""
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is not {LEGAL_SECONDS}")
    return seconds
