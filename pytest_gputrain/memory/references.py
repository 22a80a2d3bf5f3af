"""Which variable keeps an object alive, as a person would say it: ``history[0] in train at train.py:31``.

One walk through everything that Python code can reach, from the variables of running functions (the innermost
first) and the globals of modules (the user's first), until all objects asked for are found. What only C++
holds, as what autograd saves for backward, is not reached.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pytest_gputrain.memory.lines import is_ours, is_users
from pytest_gputrain.memory.links import way

_LEAVES = (str, int, float, bytes)


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


def holders_of(targets: Iterable[object]) -> dict[int, Holder]:
    """The nearest holder of each target, by its ``id``; none for those that no Python variable reaches."""
    wanted = {id(target) for target in targets}
    came_from: dict[int, Any] = {}
    queue: deque[Any] = deque()
    for root, value in [*_locals(), *_globals()]:
        if id(value) not in came_from:
            came_from[id(value)] = root
            queue.append(value)
    found: dict[int, Holder] = {}
    while queue and len(found) < len(wanted):
        parent = queue.popleft()
        if id(parent) in wanted and id(parent) not in found:
            found[id(parent)] = _holder(parent, came_from)
        for child in gc.get_referents(parent):
            if id(child) not in came_from and type(child) not in _LEAVES:
                came_from[id(child)] = parent
                queue.append(child)
    return found


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


def _globals() -> Iterator[tuple[ModuleType, Any]]:
    modules = [module for module in [*sys.modules.values()] if isinstance(module, ModuleType)]
    modules.sort(key=lambda module: not is_users(getattr(module, "__file__", None) or "<frozen"))
    return ((module, vars(module)) for module in modules)


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
    if not frame.f_code.co_flags & CO_OPTIMIZED:
        return []  # of a module: its globals
    code = frame.f_code
    place = f"{code.co_name} at {Path(code.co_filename).name}:{frame.f_lineno}"
    values = frame.f_locals
    found = [(_Local(name, place), value) for name, value in values.items()]
    if isinstance(values, dict):  # before Python 3.13 a copy, which would itself keep everything alive
        values.clear()
    return found
