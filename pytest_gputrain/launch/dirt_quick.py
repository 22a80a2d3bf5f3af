"""Probes of things too many, or too slow, to be read after every call: a quick look tells when to."""

from __future__ import annotations

import builtins
import contextlib
import logging
import operator
import os
import random
import time
import warnings
from types import ModuleType
from typing import Any

from .dirt import Probe

STANDARD = (builtins, os, time, random, warnings)
"""Modules whose functions tests like to replace."""


class Glance:
    """A probe that costs time, behind a look that costs none: it is read again only when the look differs."""

    def __init__(self, look: Probe, probe: Probe) -> None:
        self._look, self._probe = look, probe
        self._seen, self._value = look(), probe()

    def __call__(self) -> object:
        """The probe's value."""
        if (now := self._look()) != self._seen:
            self._value = self._probe()
            self._seen = now
        return self._value


class Loggers:
    """The root logger and those that are there, to see that none was set up anew. What comes new is fine."""

    _read = tuple(map(operator.attrgetter, ("level", "disabled", "propagate", "handlers")))

    def __init__(self) -> None:
        there = logging.root.manager.loggerDict.values()
        self._loggers = [logging.root, *(each for each in there if isinstance(each, logging.Logger))]
        self._clean: dict[str, object] = dict.fromkeys((each.name for each in self._loggers), "as it was")
        self._clean["disable"] = logging.root.manager.disable
        *plain, handlers = self._now()
        self._values = [*plain, list(map(list, handlers))]

    def _now(self) -> list[list[Any]]:
        return [list(map(read, self._loggers)) for read in self._read]  # hundreds, after every call: in C

    def __call__(self) -> dict[str, object]:
        """Each by name, and whether logging is off as a whole."""
        now, disable = self._now(), logging.root.manager.disable
        if now == self._values and disable == self._clean["disable"]:
            return self._clean
        trios = zip(self._loggers, zip(*now, strict=True), zip(*self._values, strict=True), strict=True)
        different = {logger.name: after for logger, after, before in trios if after != before}
        return {**self._clean, "disable": disable, **different}


class Attributes:
    """Public functions and classes of some modules, to see that none was replaced. What comes new is fine."""

    def __init__(self, *namespaces: type | ModuleType) -> None:
        self._known = []
        for space in namespaces:
            known = {name: value for name, value in vars(space).items() if _may_be_replaced(name, value)}
            self._known.append((space, known, _contents(space)))

    def __call__(self) -> dict[str, str]:
        """The replaced ones, by name; none when clean."""
        found: dict[str, str] = {}
        for number, (space, known, contents) in enumerate(self._known):
            now = _contents(space)
            with contextlib.suppress(Exception):  # a value that cannot be compared is a new one
                if now == contents:  # thousands, after every call: in C
                    continue
            there = vars(space)
            replaced = [name for name, value in known.items() if there.get(name) is not value]
            found.update({f"{space.__name__}.{name}": "" for name in replaced})
            if not replaced:
                self._known[number] = (space, known, now)
        return found


def _may_be_replaced(name: str, value: object) -> bool:
    return callable(value) and (not name.startswith("_") or name in ("__init__", "__call__"))


def _contents(space: type | ModuleType) -> list[object]:
    """What a namespace holds, quick to compare: what is the same object is not asked whether it is equal."""
    return list(vars(space).values())
