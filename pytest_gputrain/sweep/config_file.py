"""Reading a branch's configuration: assignments of plain values, taken from the syntax tree, never run.

A file that somebody has edited is welcome as long as it is one, and its numbers still agree with each other.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WAY_OUT = "mend it, or plan again with gputrain branches plan --force"
# Whole numbers from 1 up that a configuration has to have, beside learning_rate.
COUNTS = (
    "k",
    "total_batch_size",
    "device_batch_size",
    "accumulation_steps",
    "last_micro_batch",
    "world_size",
    "block_size",
    "tokens",
    "num_steps",
    "last_step_sequences",
    "last_step_device_batch_size",
    "last_step_accumulation_steps",
    "last_step_last_micro_batch",
)


class SweepError(ValueError):
    """Planned branches that cannot be used; the message is one line and names the file."""


def read_config(path: Path) -> dict[str, Any]:
    """Return the names and values of a configuration. Raises SweepError with file and line.

    Names that no branch needs are kept: a user's script may take more options.
    """
    return parse_config(read_file(path), path)


def read_file(path: Path) -> bytes:
    """Return what a regular file holds. Raises SweepError."""
    if path.exists() and not path.is_file():
        raise SweepError(f"{path} is not a file; {WAY_OUT}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SweepError(f"{path} cannot be read ({error.strerror or error}); {WAY_OUT}") from None


def parse_config(data: bytes, path: Path) -> dict[str, Any]:
    """Return the same from what the file holds; ``path`` is for the messages. Raises SweepError."""
    values = dict(_assignments(data, path))
    if wrong := _wrong(values):
        raise SweepError(f"{path}: {wrong}; {WAY_OUT}")
    return values


def _assignments(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        tree = ast.parse(data.decode("utf-8-sig"))
    except SyntaxError as error:
        raise SweepError(f"{path}:{error.lineno or 1}: {error.msg}; {WAY_OUT}") from None
    except (ValueError, RecursionError, MemoryError):  # not UTF-8, null bytes, nested without end
        raise SweepError(f"{path}: this is no Python text; {WAY_OUT}") from None
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        name, value = _assignment(statement, path)
        if name in names:
            raise SweepError(f"{path}:{statement.lineno}: {name} is given a second time; {WAY_OUT}")
        names.add(name)
        yield name, value


def _assignment(statement: ast.stmt, path: Path) -> tuple[str, Any]:
    """The name and the value of ``name = value`` or ``name: type = value``."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=node):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node):
            pass
        case _:
            raise SweepError(f"{path}:{statement.lineno}: this is not `name = value`; {WAY_OUT}")
    try:
        return name, ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise SweepError(
            f"{path}:{statement.lineno}: {name} is no plain value (a number, a text, a list); {WAY_OUT}"
        ) from None


def _wrong(values: Mapping[str, Any]) -> str | None:
    """What is missing, of a wrong kind or in disagreement; None where all is well."""
    for name in (*COUNTS, "learning_rate"):
        if name not in values:
            return f"{name} is missing"
    for name in COUNTS:
        if type(values[name]) is not int or values[name] < 1:
            return f"{name} is {values[name]!r}; legal is a whole number of 1 or more"
    rate = values["learning_rate"]
    if type(rate) not in (int, float) or not 0 < rate < math.inf:
        return f"learning_rate is {rate!r}; legal is a finite number above 0"
    return _wrong_step(values, "", "total_batch_size") or _wrong_last(values) or _wrong_tokens(values)


def _wrong_step(values: Mapping[str, Any], prefix: str, total: str) -> str | None:
    """Whether the micro-batches of a step make its batch, on all ranks."""
    size, last = values[f"{prefix}device_batch_size"], values[f"{prefix}last_micro_batch"]
    steps, ranks = values[f"{prefix}accumulation_steps"], values["world_size"]
    if last > size:
        return f"{prefix}last_micro_batch {last} is above {prefix}device_batch_size {size}"
    made = (size * (steps - 1) + last) * ranks
    if made != values[total]:
        sum_ = f"({size} x {steps - 1} + {last}) x {ranks}" if last != size else f"{size} x {steps} x {ranks}"
        return f"{total} is {values[total]}, but the micro-batches make {made} ({sum_})"
    return None


def _wrong_last(values: Mapping[str, Any]) -> str | None:
    last, total = values["last_step_sequences"], values["total_batch_size"]
    if last > total:
        return f"last_step_sequences {last} is above total_batch_size {total}"
    if values["last_step_device_batch_size"] > values["device_batch_size"]:
        return "last_step_device_batch_size is above device_batch_size"
    return _wrong_step(values, "last_step_", "last_step_sequences")


def _wrong_tokens(values: Mapping[str, Any]) -> str | None:
    """Whether the steps see the tokens: a branch that sees others cannot be compared."""
    steps, total, last = values["num_steps"], values["total_batch_size"], values["last_step_sequences"]
    seen = ((steps - 1) * total + last) * values["block_size"]
    if seen != values["tokens"]:
        return (
            f"tokens is {values['tokens']}, but the steps see {seen} "
            f"(({steps - 1} x {total} + {last}) x {values['block_size']})"
        )
    return None
