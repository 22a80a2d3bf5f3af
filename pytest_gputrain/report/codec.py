"""Between JSON and the frozen dataclasses of ``report/model.py``, by their annotations. Pure.

Reading refuses what is not of the annotated kind and says where it is: ``tests[3].seconds is 'x'; …``.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from pytest_gputrain.report.reading import ReportError

_T = TypeVar("_T")
_Reader = Callable[[Any, str], Any]


def encode(value: Any) -> Any:
    """Plain JSON: objects, lists, text, finite numbers, true, false and null."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is tuple or kind is list:
        return [encode(one) for one in value]
    if is_dataclass(kind):
        return {name: encode(getattr(value, name)) for name in _names(kind)}
    if isinstance(value, Mapping):
        return {str(key): encode(one) for key, one in value.items()}
    return plain(value)


def plain(value: Any) -> Any:
    """The value as JSON: numbers that are not finite, and whatever JSON does not know, as text."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)  # of an enumeration the number
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return _text(value)


def decode(kind: type[_T], document: Any, where: str = "") -> _T:
    """An object of that class. Raises ReportError, one line saying where and what is needed."""
    if not isinstance(document, Mapping):
        raise _wrong(document, where or "the report", "a JSON object")
    found = {}
    for name, read, default in _readers(typing.cast(Any, kind)):
        place = f"{where}.{name}" if where else name
        if name in document:
            found[name] = read(document[name], place)
        elif default is MISSING:
            raise ReportError(f"{place} is missing")
    return kind(**found)


@functools.cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))


@functools.cache
def _readers(kind: type[Any]) -> tuple[tuple[str, _Reader, object], ...]:
    hints = typing.get_type_hints(kind)
    return tuple(
        (one.name, _reader(hints[one.name]), one.default if one.default_factory is MISSING else None)
        for one in fields(kind)
    )


def _reader(hint: Any) -> _Reader:
    """What reads a value of that annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return functools.partial(decode, hint)
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin in (Union, types.UnionType):
        [inner] = [one for one in arguments if one is not type(None)]
        return functools.partial(_optional, _reader(inner))
    if origin is tuple:
        return functools.partial(_many, _reader(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return functools.partial(_object, _reader(arguments[1]))
    return {str: _string, int: _whole, float: _number, bool: _flag}.get(hint, _anything)


def _optional(read: _Reader, value: Any, where: str) -> Any:
    return None if value is None else read(value, where)


def _many(read: _Reader, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(value, where, "a list")
    return tuple([read(one, f"{where}[{index}]") for index, one in enumerate(value)])


def _object(read: _Reader, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, where, "a JSON object")
    return {key: read(one, f"{where}.{key}") for key, one in value.items()}


def _choice(legal: tuple[str, ...], value: Any, where: str) -> Any:
    if value not in legal:
        raise _wrong(value, where, f"one of {', '.join(legal)}")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, where, "text")
    return value


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, where, "a whole number")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(value, where, "a number")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def _anything(value: Any, where: str) -> Any:
    return value


def _wrong(value: Any, where: str, legal: str) -> ReportError:
    shown = _text(value) if not isinstance(value, str) else repr(value)
    return ReportError(
        f"{where} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it has to be {legal}"
    )


def _text(value: Any) -> str:
    try:
        return " ".join(str(value).split())
    except Exception:  # a user's object whose __str__ raises
        return f"<{type(value).__name__}>"
