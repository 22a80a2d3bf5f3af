"""One text for a value, the same in every process: no addresses, no order of sets. Imports no torch."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

MOST_DEPTH = 4  # a configuration may lead to the object that holds it
MOST_ITEMS = 1000  # a vocabulary in a configuration is told by its length


def plain(value: object) -> str | None:
    """Text for scalars, sequences, dataclasses and named tuples of such; None for anything else."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, types.SimpleNamespace) or _is_record(value):
        return text(value)
    if isinstance(value, tuple | list | frozenset):
        items = [plain(item) for item in value]
        texts = [item for item in items if item is not None]
        if len(texts) < len(items):
            return None
        return repr(sorted(texts) if isinstance(value, frozenset) else texts)
    return None


def text(value: Any, depth: int = MOST_DEPTH) -> str:
    """Text for any value: of one that is neither plain nor a container its class and its attributes."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    name = type(value).__qualname__
    if callable(value) or isinstance(value, types.ModuleType):
        return str(getattr(value, "__qualname__", name))
    if type(value).__module__ == "torch" and name in ("dtype", "device"):
        return str(value)
    if depth == 0 or _is_large(value):
        return name
    if isinstance(value, Mapping):
        return _items(value, depth)
    if isinstance(value, set | frozenset):
        return f"{name} {sorted(text(item, depth - 1) for item in value)}"
    if isinstance(value, tuple | list) and not hasattr(value, "_asdict"):
        return f"{name} {[text(item, depth - 1) for item in value]}"
    return f"{name} {_items(fields_of(value), depth)}"


def fields_of(value: Any) -> Mapping[Any, Any]:
    """The fields of a configuration, whatever its class; private ones too."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    return dict(getattr(value, "__dict__", {}))


def _items(value: Mapping[Any, Any], depth: int) -> str:
    return repr(sorted((str(name), text(held, depth - 1)) for name, held in value.items()))


def _is_record(value: object) -> bool:
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or hasattr(value, "_asdict")


def _is_large(value: Any) -> bool:
    return isinstance(value, Mapping | tuple | list | set | frozenset) and len(value) > MOST_ITEMS
