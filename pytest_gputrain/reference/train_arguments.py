"""How the training script reads its command line: spellings, kinds of values, and the one-line error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from pytest_gputrain.values import (
    FALSE,
    LEGAL_FLAG,
    LEGAL_SIZE,
    TRUE,
    capacity_in_bytes,
    parse_flag,
    parse_size,
)


class TrainUsageError(ValueError):
    """What the user gave cannot be trained with; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Raises TrainUsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> Any:
        raise TrainUsageError(message)


def add(
    parser: argparse.ArgumentParser,
    name: str,
    kind: Callable[[str], Any],
    default: Any,
    text: str,
    alias: str | None = None,
    *,
    choices: Sequence[str] | None = None,
) -> None:
    """One option under all its spellings; a flag may be given bare or as ``--flag=false``."""
    names = [name, alias] if alias else [name]
    spelt = [f"--{s}" for n in names for s in dict.fromkeys((n, n.replace("_", "-")))]
    bare: dict[str, Any] = {"nargs": "?", "const": True} if kind is flag else {}
    parser.add_argument(*spelt, dest=name, type=kind, default=default, help=text, choices=choices, **bare)


def whole(least: int) -> Callable[[str], int]:
    """A whole number from ``least`` up."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise _legal(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return read


def number(low: float, high: float, legal: str, *, low_too: bool = True) -> Callable[[str], float]:
    """A number in [low, high), or in (low, high); ``legal`` says so in words."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high) or (value == low and not low_too):
            raise _legal(f"{text!r} is not a number {legal}")
        return value

    return read


def flag(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise _legal(f"{text!r} is not {LEGAL_FLAG}")
    return parse_flag(text)


def sizes(text: str) -> tuple[int, ...]:
    """Sizes of memory in bytes, with commas between them, by rank."""
    try:
        found = tuple(parse_size(part) for part in text.split(","))
    except ValueError:
        raise _legal(f"{text!r} is not {LEGAL_SIZE}, or several with commas, by rank") from None
    try:
        return tuple(map(capacity_in_bytes, found))
    except ValueError as error:
        raise _legal(str(error).removeprefix("capacity=")) from None


def _legal(text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(text)
