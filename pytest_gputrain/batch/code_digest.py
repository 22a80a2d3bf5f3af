"""A digest of what functions do, so that an edited forward or loss makes what was measured before stale.

Covers the byte code of functions, methods and nested functions, their defaults and closures, the plain
globals that they read (``SEQ_LEN = 512``), and the functions and classes of the user's own modules that they
call. Not covered: installed packages (their classes' own code is, what it calls is not), values reached
through attributes, C extensions. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pytest_gputrain.batch.stable_text import plain
from pytest_gputrain.case import loading

MOST_FUNCTIONS = (
    2000  # a bound on the time it takes: such a closure of calls is a framework, not a user's code
)
_INSTALLED = ("site-packages", "dist-packages", f"{sys.prefix}/lib/python", f"{sys.base_prefix}/lib/python")
# A case's defaults, told by name: their version is in the key, and under pytest, which rewrites their
# assertions, they have other byte code.
_DEFAULTS = str(Path(loading.__file__).parent)


def code_digest(functions: Iterable[Any]) -> str:
    """Return a digest of the functions, classes or callable objects, and of what they use."""
    todo = list(functions)
    seen: dict[int, Any] = {}  # kept alive: another object must not come by the same id
    digest = hashlib.sha256()
    while todo and len(seen) < MOST_FUNCTIONS:
        found = todo.pop(0)
        if id(found) in seen:
            continue
        seen[id(found)] = found
        for part in _parts(found):
            if isinstance(part, str):
                digest.update(part.encode(errors="replace") + b"\0")
            else:
                todo.append(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """Texts for the digest, and further functions and classes to look at."""
    if isinstance(value, functools.partial):
        yield from (value.func, _values(value.args), _values(value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, type(value.__self__))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, loading.LazyCallable):
        yield value.resolve()
    elif not isinstance(value, types.BuiltinFunctionType):
        yield from (type(value), _values(getattr(value, "__dict__", {}).values()))
        yield from (held for held in getattr(value, "__dict__", {}).values() if _is_code(held))


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    if function.__code__.co_filename.startswith(_DEFAULTS):
        yield function.__qualname__
        return
    if wrapped := getattr(function, "__wrapped__", None):
        yield wrapped
    yield from (function.__qualname__, *_of_code(function.__code__))
    yield _values([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not yet filled
            continue
        yield held if _is_code(held) else _values([held])
    if not _is_installed(function.__code__.co_filename):
        yield from _of_globals(function)


def _of_globals(function: types.FunctionType) -> Iterator[Any]:
    for name in sorted(_names(function.__code__)):
        held = function.__globals__.get(name)
        if _is_code(held):
            if not _is_installed(_file_of(held)):
                yield held
        elif held is not None and (text := plain(held)) is not None:
            yield f"{name}={text}"


def _of_class(cls: type) -> Iterator[Any]:
    yield f"{cls.__module__}.{cls.__qualname__}"
    for name, held in sorted(vars(cls).items()):
        function = getattr(
            held, "__func__", getattr(held, "fget", held)
        )  # class and static methods, properties
        if isinstance(function, types.FunctionType):
            yield function
        elif not name.startswith("__") and (text := plain(held)) is not None:
            yield f"{name}={text}"
    yield from (base for base in cls.__bases__ if not _is_installed(_file_of(base)))


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield " ".join(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        else:
            yield (
                repr(constant) if isinstance(constant, float) else plain(constant) or type(constant).__name__
            )


def _names(code: types.CodeType) -> set[str]:
    nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _values(values: Iterable[object]) -> str:
    return " ".join(plain(value) or type(value).__qualname__ for value in values)


def _is_code(value: object) -> bool:
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial | type)


def _file_of(value: Any) -> str:
    """Where that function or class was written; empty where nobody knows, as of one typed in."""
    function = getattr(value, "func", value)
    if code := getattr(function, "__code__", None):
        return str(code.co_filename)
    name = getattr(function, "__module__", "") or ""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return _INSTALLED[0]
    return getattr(sys.modules.get(name), "__file__", None) or ""


def _is_installed(filename: str) -> bool:
    return any(mark in filename for mark in _INSTALLED)
