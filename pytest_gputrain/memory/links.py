"""How one object holds the next, written as Python where it can be: ``.cache['x'][0]``."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import (
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    TracebackType,
)
from typing import Any

# Where torch.nn.Module keeps what a user reaches as an attribute.
_TABLES_OF_MODULES = ("_modules", "_parameters", "_buffers")


def way(chain: Sequence[Any]) -> str:
    """The way from the first object of the chain to the last, each of which holds the next."""
    return "".join(_link(chain, place) for place in range(len(chain) - 1))


def _link(chain: Sequence[Any], place: int) -> str:
    holder, held = chain[place], chain[place + 1]
    if isinstance(holder, dict):
        return _of_dict(chain, place)
    if isinstance(holder, list | tuple | deque):
        return _of_sequence(chain, place)
    if isinstance(holder, set | frozenset):
        return "{…}"
    if isinstance(holder, FrameType):
        code = holder.f_code
        value = chain[place + 2] if isinstance(held, CellType) else held  # a variable of a closure
        name = _key_of(holder.f_locals, value) or "?"
        return f" > `{name}` in {code.co_name} at {Path(code.co_filename).name}:{holder.f_lineno}"
    if isinstance(holder, GeneratorType | CoroutineType):
        return f" > suspended {holder.__name__}"
    if isinstance(holder, CellType | TracebackType | FunctionType | MethodType):
        return "" if not isinstance(holder, MethodType) else ".__self__"
    if isinstance(holder, BaseException) and isinstance(held, TracebackType):
        return ".__traceback__"
    return _of_object(holder, held)


def _of_dict(chain: Sequence[Any], place: int) -> str:
    holder, held = chain[place], chain[place + 1]
    key = _key_of(holder, held)
    owner = chain[place - 1] if place else None
    if isinstance(owner, FunctionType) and holder is owner.__globals__:
        return f" > global `{key}`"
    if owner is not None and getattr(owner, "__dict__", None) is holder:
        return "" if key in _TABLES_OF_MODULES else f".{key}"
    if _is_table_of_module(chain, place) and isinstance(key, str):
        return f"[{key}]" if key.isdigit() else f".{key}"
    return "[…]" if key is None else f"[{_short(key)}]"


def _is_table_of_module(chain: Sequence[Any], place: int) -> bool:
    owners = chain[max(place - 2, 0) : place]
    return any(getattr(owner, name, None) is chain[place] for owner in owners for name in _TABLES_OF_MODULES)


def _of_sequence(chain: Sequence[Any], place: int) -> str:
    holder, held = chain[place], chain[place + 1]
    index = next((index for index, value in enumerate(holder) if value is held), None)
    owner = chain[place - 1] if place else None
    if isinstance(owner, FunctionType) and index is not None and holder is owner.__closure__:
        return f" > `{owner.__code__.co_freevars[index]}` in the closure of {owner.__qualname__}"
    return f"[{'…' if index is None else index}]"


def _of_object(holder: Any, held: Any) -> str:
    attributes = getattr(holder, "__dict__", None)
    if attributes is held:
        return ""
    if isinstance(attributes, dict) and (key := _key_of(attributes, held)) is not None:
        return "" if key in _TABLES_OF_MODULES else f".{key}"
    name = getattr(holder, "__name__", None)
    return f" > {type(holder).__name__}" + (f" {name}" if isinstance(name, str) else "")


def _key_of(values: Any, held: Any) -> Any:
    return next((key for key, value in [*values.items()] if value is held), None)


def _short(key: Any) -> str:
    if not isinstance(key, str | int | float | bool | tuple):
        return type(key).__name__
    text = repr(key)
    return text if len(text) <= 40 else text[:37] + "..."
