"""The plain Python state that a case's functions keep between calls, put back as it was.

A loss that counts its calls, a step that keeps a scheduler, a ``model`` that hands out the same module each
time: closures, bound objects, partial arguments and the globals that the user's own functions name are
followed through containers, modules, optimizers and instances of the user's classes. What they refer to is
put back, and nothing is copied but tables of references. Not covered: iterators and files, which go on, and
state in C.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pytest_gputrain.case.loading import CaseError, LazyCallable

MOST_OBJECTS = 100_000  # a bound on the time it takes
MOST_ITEMS = 10_000  # a longer container is data, not state
_ATOMS = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType)
_STATEFUL = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
)
_INSTALLED = ("site-packages", "dist-packages", f"{sys.prefix}/lib/python", f"{sys.base_prefix}/lib/python")
_TABLES = (dict, list, set, deque)


class Remembered:
    """``add(roots)`` writes down what is reachable and how it is; ``put_back()`` undoes every change."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # kept alive: another object must not come by the same id
        self._undo: list[Callable[[], None]] = []

    def add(self, roots: Iterable[Any]) -> None:
        todo = deque(roots)
        while todo and len(self._seen) < MOST_OBJECTS:
            found = todo.popleft()
            if not isinstance(found, _ATOMS) and id(found) not in self._seen:
                self._seen[id(found)] = found
                todo.extend(self._parts(found))

    def put_back(self) -> None:
        for undo in self._undo:
            undo()

    def _parts(self, found: Any) -> Iterable[Any]:
        """What hangs on it, after having written it down."""
        if isinstance(found, torch.Tensor):
            return self._tensor(found)
        if isinstance(found, types.FunctionType):
            return [*self._cells(found), *self._globals(found), *(found.__defaults__ or ())]
        if isinstance(found, types.MethodType):
            return (found.__func__, found.__self__)
        if isinstance(found, functools.partial):
            return (found.func, found.args, found.keywords)
        if isinstance(found, LazyCallable):
            with contextlib.suppress(CaseError):  # for whoever calls it
                return (found.resolve(),)
        if isinstance(found, tuple):
            return found
        if isinstance(found, _TABLES):
            return self._table(found)
        if isinstance(found, _STATEFUL) or _is_users(sys.modules.get(type(found).__module__)):
            return (getattr(found, "__dict__", None), *_methods(type(found)))
        return ()

    def _tensor(self, tensor: Any) -> Iterable[Any]:
        if tensor.is_leaf and tensor.requires_grad:
            before = tensor.grad

            def undo() -> None:
                if tensor.grad is not before:
                    tensor.grad = before

            self._undo.append(undo)
        return ()

    def _cells(self, function: types.FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not yet filled
                before = cell.cell_contents
                self._undo.append(functools.partial(setattr, cell, "cell_contents", before))
                yield before

    def _globals(self, function: types.FunctionType) -> Iterator[Any]:
        """Those that the function names, unless it is an installed package's."""
        if _is_installed(function.__code__.co_filename):
            return
        there = function.__globals__
        for name in _names(function.__code__):
            if name in there:
                before = there[name]
                self._undo.append(functools.partial(there.__setitem__, name, before))
                yield before

    def _table(self, table: Any) -> Iterable[Any]:
        if len(table) > MOST_ITEMS:
            return ()
        before = table.copy()
        items = _items(before)

        def undo() -> None:
            if len(table) != len(items) or any(a is not b for a, b in zip(_items(table), items, strict=True)):
                table.clear()
                (table.extend if isinstance(table, list | deque) else table.update)(before)

        self._undo.append(undo)
        return before.values() if isinstance(before, dict) else before


def _items(table: Any) -> list[Any]:
    """Its references, in order."""
    return [*table, *table.values()] if isinstance(table, dict) else [*table]


def _names(code: types.CodeType) -> Iterator[str]:
    """Of globals, those of functions inside included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _methods(kind: type) -> tuple[types.FunctionType, ...]:
    """Of the user's classes: what they name as globals counts too."""
    users = [one for one in kind.__mro__ if _is_users(sys.modules.get(one.__module__))]
    return tuple(held for one in users for held in vars(one).values() if isinstance(held, types.FunctionType))


def _is_users(module: types.ModuleType | None) -> bool:
    """None: of a class that came to a rank by value, as those of a test file or a nested function do."""
    if module is None:
        return True
    file = getattr(module, "__file__", None)
    return (file is None or not _is_installed(file)) and module.__name__ != "builtins"


def _is_installed(file: str) -> bool:
    return any(part in file for part in _INSTALLED) or file.startswith("<frozen")
