"""This process's environment for a launch, without reading all of it again every time.

Between two launches hardly anything changes (under pytest, PYTEST_CURRENT_TEST), yet decoding a hundred
variables and asking of each what it means for the ranks would take as long as a collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

_seen: tuple[dict[Any, Any], dict[str, str]] = {}, {}
"""The environment as it was last, before and after decoding."""


def own() -> dict[str, str]:
    """``dict(os.environ)``; the caller's to change."""
    global _seen
    raw = getattr(os.environ, "_data", None)  # bytes, as the C library has them
    if raw is None:
        return dict(os.environ)
    before, decoded = _seen
    if raw != before:
        now = dict(raw)
        changed = differing(now, before)
        new = {os.fsdecode(name): os.fsdecode(now[name]) if name in now else None for name in changed}
        decoded = patched(decoded, new)
        _seen = now, decoded
    return dict(decoded)


def differing(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> list[Any]:
    """Names whose values are not the same in both."""
    found = [name for name, value in now.items() if before.get(name) != value]
    if len(now) - len(found) != len(before):
        found += [name for name in before if name not in now]
    return found


def change(now: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str | None]:
    """What makes ``now`` of ``before``: new values, None for what goes."""
    return {name: now.get(name) for name in differing(now, before)}


def patched(before: Mapping[str, str], changed: Mapping[str, str | None]) -> dict[str, str]:
    """``before`` with a change."""
    both = {**before, **changed}
    return {name: value for name, value in both.items() if value is not None}


_Value = TypeVar("_Value")


class Remembered(Generic[_Value]):
    """A function of an environment, evaluated again only if a variable has changed that it reads."""

    def __init__(self, function: Callable[[Mapping[str, str]], _Value], reads: Callable[[str], bool]) -> None:
        self._function, self._reads = function, reads
        self._last: tuple[Mapping[str, str], _Value] | None = None

    def __call__(self, environ: Mapping[str, str]) -> _Value:
        """The function's value. Raises what the function raises, every time."""
        last = self._last
        if last is None or any(map(self._reads, differing(environ, last[0]))):
            last = environ, self._function(environ)
        self._last = environ, last[1]
        return last[1]


def reads(
    of_name: Callable[[str], bool],
) -> Callable[[Callable[[Mapping[str, str]], _Value]], Remembered[_Value]]:
    """Remembers a function's last value; ``of_name`` says of a variable whether the function looks at it."""
    return lambda function: Remembered(function, of_name)
