"""The JSON Schema of ``report.json`` (draft 2020-12), made from the model. Pure.

``python -m pytest_gputrain.report.schema`` prints it; what is published in ``schema/`` is this, which a test
compares.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.resources import files
from typing import Any, Literal, Union

from pytest_gputrain.report.model import Report
from pytest_gputrain.report.reading import SCHEMA, VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema() -> dict[str, Any]:
    """The schema as a document. Names that it does not know are allowed: versions of one number grow."""
    known: dict[str, Any] = {}
    _define(Report, known)
    report = known.pop("Report")
    report["properties"] |= {"schema": {"const": SCHEMA}, "version": {"const": VERSION}}
    report["required"] = ["schema", "version", *report["required"]]
    return {"$schema": DIALECT, "title": SCHEMA, **report, "$defs": known}


def published() -> dict[str, Any]:
    """The schema that this package ships."""
    text = (files(__package__) / "schema" / f"report-{VERSION}.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def _define(kind: type[Any], known: dict[str, Any]) -> None:
    if kind.__name__ in known:
        return
    found = known[kind.__name__] = {"type": "object"}
    hints = typing.get_type_hints(kind)
    if kind.__doc__:
        found["description"] = " ".join(kind.__doc__.split())
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    found |= {"properties": {one.name: _of(hints[one.name], known) for one in fields(kind)}}
    found |= {"required": needed}


def _of(hint: Any, known: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        _define(hint, known)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"enum": [*arguments]}
    if origin in (Union, types.UnionType):
        [inner] = [one for one in arguments if one is not type(None)]
        return {"anyOf": [_of(inner, known), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], known)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(arguments[1], known)}
    return {"type": _PLAIN[hint]} if hint in _PLAIN else {}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
