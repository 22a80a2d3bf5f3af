"""Which learning rates a rank's optimizers really step with, and how often: ``rates.json`` in its folder.

A checkpoint's optimizer state brings its own rate, and a script that loads it prints the one that it was
asked for. What counts is what is in the groups in the moment of the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_gputrain.trace.opened import opened_arguments
from pytest_gputrain.trace.optimizers import Held, OptimizerWatch

RATES = "rates.json"


class Rates:
    """Looks at every step of torch's optimizers while ``watching``; writes the file at the end.

    The file: ``{"optimizers": [{"type", "steps", "last_at", "groups": [{"first", "highest", "last"}]}],
    "opened": […]}``, with the files among the script's arguments that it has opened. ``last_at`` counts the
    steps of all optimizers: whose is highest has stepped last.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RATES
        self._optimizers: list[dict[str, Any]] = []
        self._known: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._pid, self._count = os.getpid(), 0
        self._opened: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            with OptimizerWatch(None, before=self._before), opened_arguments() as self._opened:
                yield
        finally:
            if os.getpid() == self._pid:
                self._write()

    def _before(self, optimizer: Any, held: Held) -> None:
        seen = self._known.get(optimizer)
        if seen is None:
            kind = type(optimizer).__name__
            seen = self._known[optimizer] = {"type": kind, "steps": 0, "last_at": 0, "groups": []}
            self._optimizers.append(seen)
        self._count += 1
        seen["steps"], seen["last_at"] = seen["steps"] + 1, self._count
        for number, group in enumerate(optimizer.param_groups):
            rate = float(group.get("lr", 0.0))
            if number == len(seen["groups"]):
                seen["groups"].append({"first": rate, "highest": rate, "last": rate})
            mine = seen["groups"][number]
            mine["highest"], mine["last"] = max(mine["highest"], rate), rate

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        told = {"optimizers": self._optimizers, "opened": sorted(self._opened)}
        self._path.write_text(json.dumps(told) + "\n", encoding="utf-8")


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """Return the optimizers of a rank's folder; empty where none has stepped, or the rank has been ended."""
    try:
        found = json.loads((folder / RATES).read_text(encoding="utf-8"))
        return [dict(one) for one in found["optimizers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def has_opened(folder: Path, file: Path) -> bool | None:
    """Whether a rank has opened this file, which its arguments name; None where the rank did not say."""
    try:
        found = json.loads((folder / RATES).read_text(encoding="utf-8"))
        return os.path.realpath(file) in found["opened"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
