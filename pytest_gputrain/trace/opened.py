"""Which of the files that its arguments name a script has opened: a checkpoint that it never reads, say.

Sees what Python opens in this process (``open``, ``torch.load``, ``os.open``), not what a library opens by
itself, as safetensors does, nor what another process opens.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_open: list[set[str]] = []
_hooked = False


@contextlib.contextmanager
def opened_arguments() -> Iterator[set[str]]:
    """Yields a set that fills with real paths. An audit hook stays in the process and does nothing later."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_heard)
    found: set[str] = set()
    _open.append(found)
    try:
        yield found
    finally:
        _open[:] = [one for one in _open if one is not found]


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _open:
        return
    path = arguments[0]
    if (
        isinstance(path, str)
        and (name := os.path.basename(path))
        and any(name in one for one in sys.argv[1:])
    ):
        for found in _open:
            found.add(os.path.realpath(path))
