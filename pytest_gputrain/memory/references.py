"""Which variable keeps an object alive, as a person would say it: ``history[0] in train at train.py:31``.

A walk through what Python code can reach, from the variables of running functions (the innermost first) and
the globals of modules (the user's first). What only C++ holds, as what autograd saves for backward, is not
reached.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pytest_gputrain.memory.lines import is_ours, is_users
from pytest_gputrain.memory.links import way

_LEAVES = (str, int, float, bytes)
# The place of what is given by name, and is no variable of a running function of the user's.
KNOWN = "the case"


@dataclass(frozen=True)
class Holder:
    """The variable ``name`` in ``place``, and the ``way`` from it to what it holds: empty for its value."""

    name: str
    way: str
    place: str
    is_local: bool
    root: type
    """What the variable is."""

    def __str__(self) -> str:
        return f"{'' if self.is_local else 'global '}`{self.name}`{self.way} in {self.place}"


@dataclass(frozen=True)
class _Local:
    name: str
    place: str


class Walk:
    """What Python code can reach; ``near`` first, and ``far`` only for what is not found there."""

    def __init__(self) -> None:
        self._came_from: dict[int, Any] = {}
        self._queue: deque[Any] = deque()
        self._far: list[Any] = []
        self._tables = {id(vars(module)) for module in _modules()}

    def near(self, known: Mapping[str, Any]) -> None:
        """Walk what running functions, the user's modules and ``known`` hold, not through code they use."""
        named = [(_Local(name, KNOWN), value) for name, value in known.items()]
        for root, value in [*_locals(), *_globals(of_users=True), *named]:
            self._reach(root, value)
        while self._queue:
            parent = self._queue.popleft()
            for child in gc.get_referents(parent):
                if type(child) in _LEAVES or id(child) in self._came_from:
                    continue
                if isinstance(child, ModuleType | type) or id(child) in self._tables:
                    self._far.append((parent, child))
                else:
                    self._reach(parent, child)

    def far(self) -> None:
        """Walk everything else: it takes a second."""
        for root, value in [*self._far, *_globals(of_users=False)]:
            self._reach(root, value)
        while self._queue:
            parent = self._queue.popleft()
            for child in gc.get_referents(parent):
                if type(child) not in _LEAVES:
                    self._reach(parent, child)

    def holder(self, target: object) -> Holder | None:
        """Who holds it; None if nothing that was walked does."""
        return _holder(target, self._came_from) if id(target) in self._came_from else None

    def passes(self, target: object, test: Callable[[Any], bool]) -> bool:
        """Whether an object on the way to it, itself included, is such a one."""
        one: Any = target
        while id(one) in self._came_from:
            if test(one):
                return True
            one = self._came_from[id(one)]
        return False

    def _reach(self, parent: Any, child: Any) -> None:
        if id(child) not in self._came_from:
            self._came_from[id(child)] = parent
            self._queue.append(child)


def _holder(target: Any, came_from: dict[int, Any]) -> Holder:
    chain = [target]
    while not isinstance(origin := came_from[id(chain[-1])], _Local | ModuleType):
        chain.append(origin)
    chain.reverse()
    if isinstance(origin, _Local):
        return Holder(origin.name, way(chain), origin.place, is_local=True, root=type(chain[0]))
    value = chain[1] if len(chain) > 1 else None
    name = next((name for name, found in [*vars(origin).items()] if found is value), "?")
    return Holder(name, way(chain[1:]), _module_place(origin), is_local=False, root=type(value))


def _module_place(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return Path(file).name if file and is_users(file) else module.__name__


def _globals(*, of_users: bool) -> Iterator[tuple[ModuleType, Any]]:
    return (
        (module, vars(module))
        for module in _modules()
        if is_users(getattr(module, "__file__", None) or "<frozen") is of_users
    )


def _modules() -> list[ModuleType]:
    return [module for module in [*sys.modules.values()] if isinstance(module, ModuleType)]


def _locals() -> Iterator[tuple[_Local, Any]]:
    """The variables of running functions: of this thread first, from the innermost outward."""
    mine = threading.get_ident()
    threads = sorted(sys._current_frames().items(), key=lambda pair: pair[0] != mine)
    for _, innermost in threads:
        frame: FrameType | None = innermost
        while frame is not None:
            if not is_ours(frame.f_code.co_filename):
                yield from _locals_of(frame)
            frame = frame.f_back


def _locals_of(frame: FrameType) -> list[tuple[_Local, Any]]:
    code = frame.f_code
    if not code.co_flags & CO_OPTIMIZED:  # of a module that is being run, whose variables are its globals
        place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
        return [(_Local(name, place), value) for name, value in frame.f_globals.items()]
    place = f"{code.co_name} at {Path(code.co_filename).name}:{frame.f_lineno}"
    values = frame.f_locals
    found = [(_Local(name, place), value) for name, value in values.items()]
    if isinstance(values, dict):  # before Python 3.13 a copy, which would itself keep everything alive
        values.clear()
    return found
