"""What some versions of torch print in between."""

from __future__ import annotations


def without_gloo(text: str) -> str:
    """A rank's output without ``[Gloo] Rank 0 is connected to 1 peer ranks. …``: torch 2.8 and 2.9."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo] "))
