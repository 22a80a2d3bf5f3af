"""What a script says of its run: JSON lines in a file, else in what it printed, else lines of text.

A line that has ``final_loss``, or ``tokens`` and no ``step``, is what the run came to; lines with ``step``
are its steps. Tokens are those that the branch has seen, not those of the base run before it. The file may
hold one object alone. Of printed text, ``step 3/98 | loss 5.12 | lr 3e-4`` and the like are read: step or
iter, a number, behind it loss and a number, lr and a number.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf))"
_STEP = re.compile(
    rf"\b(?:step|iter(?:ation)?)s?\b[\s:=#]*(\d+).*?\b(?:train[ _])?loss[\s:=]+{_NUMBER}", re.I
)
_RATE = re.compile(rf"\b(?:lr|learning[ _]rate)[\s:=]+{_NUMBER}", re.I)
_LOSSES, _RATES = ("loss", "train_loss"), ("learning_rate", "lr")


@dataclass(frozen=True)
class Point:
    """One step. tokens: seen by the branch so far, None where the script does not say."""

    step: int
    loss: float
    tokens: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Reported:
    """None where the script does not say. highest_rate: of all its steps."""

    final_loss: float | None = None
    eval_loss: float | None = None
    tokens: int | None = None
    total_batch_size: int | None = None
    highest_rate: float | None = None
    points: tuple[Point, ...] = field(default=(), repr=False)


def read_reported(metrics: Path, printed: str) -> Reported:
    """Read a run's metrics file, or what it printed where there is none."""
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    records = list(_records(text)) or list(_records(printed))
    points = [point for record in records if (point := _point(record)) is not None]
    points = points or list(_points_of_text(printed))
    last: Mapping[str, Any] = next((r for r in reversed(records) if _is_summary(r)), {})
    rates = [point.rate for point in points if point.rate is not None]
    final = _number(last.get("final_loss"))
    losses = [points[-1].loss] if points else [loss for r in records if (loss := _loss(r)) is not None]
    return Reported(
        final_loss=losses[-1] if final is None and losses else final,
        eval_loss=next(
            (loss for r in reversed(records) if (loss := _number(r.get("eval_loss"))) is not None), None
        ),
        tokens=_whole(last.get("tokens")) if last else next((p.tokens for p in points[-1:]), None),
        total_batch_size=_whole(last.get("total_batch_size")),
        highest_rate=max(rates, default=_number(last.get("learning_rate"))),
        points=tuple(points),
    )


def _records(text: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines; or the one object that the text is."""
    for candidate in (text.splitlines(), [text]):
        found = False
        for line in candidate:
            if line.lstrip().startswith("{"):
                value = _parsed(line)
                if isinstance(value, dict):
                    found = True
                    yield value
        if found:
            return


def _parsed(text: str) -> Any:
    """JSON, or a dictionary as Python prints it (transformers' Trainer does); None for anything else."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return parse(text)
    return None


def _is_summary(record: Mapping[str, Any]) -> bool:
    return "final_loss" in record or ("step" not in record and "tokens" in record)


def _point(record: Mapping[str, Any]) -> Point | None:
    step = _whole(record.get("step"))
    loss = _loss(record)
    if step is None or loss is None:
        return None
    rate = next((value for name in _RATES if (value := _number(record.get(name))) is not None), None)
    return Point(step, loss, _whole(record.get("tokens")), rate)


def _loss(record: Mapping[str, Any]) -> float | None:
    return next((value for name in _LOSSES if (value := _number(record.get(name))) is not None), None)


def _points_of_text(text: str) -> Iterator[Point]:
    for line in text.splitlines():
        if (match := _STEP.search(line)) is not None:
            rate = _RATE.search(line)
            yield Point(int(match[1]), float(match[2]), None, float(rate[1]) if rate else None)


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None
