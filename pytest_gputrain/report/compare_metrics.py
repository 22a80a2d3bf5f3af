"""The metrics of one test, held against the same test of earlier nights. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.report.likeness import apart, machine_of, settings_apart, steps_apart
from pytest_gputrain.report.nights import Night
from pytest_gputrain.report.noise import LEAST_NIGHTS, RECENT, Judged, judge
from pytest_gputrain.report.quantities import fitting, number, plural
from pytest_gputrain.report.reading import Json


@dataclass(frozen=True)
class Held:
    """test: of the new report, with its machine. nights: those in which it passed, each with the test as it
    was, the oldest first, of which the last is the earlier report. where: the earlier report, in words.
    """

    test: Json
    machine: Json | None
    nights: Sequence[tuple[Night, Json]]
    where: str


@dataclass(frozen=True)
class Metric:
    """As in the report; a value that is no number is NaN."""

    value: float
    unit: str
    better: str
    spread: float | None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Metric:
        value, spread = found.get("value"), found.get("spread")
        return cls(
            float(value) if isinstance(value, (int, float)) else math.nan,
            str(found.get("unit") or ""),
            str(found.get("better") or "equal"),
            float(spread) if isinstance(spread, (int, float)) else None,
        )


def hold(held: Held) -> Iterator[dict[str, Any]]:
    """Each metric as fields of a ``Change``: worse, better, the same, or not comparable and why."""
    night, before = held.nights[-1]
    earlier = before.get("metrics") or {}
    now = held.test.get("metrics") or {}
    why = [*apart(machine_of(night.report, before), held.machine), *settings_apart(before, held.test)]
    for name in dict.fromkeys([*now, *earlier]):
        if why:
            yield _not(held, name, "; ".join(why))
        elif name not in now:
            yield _not(held, name, "no longer measured")
        elif name not in earlier:
            yield _not(held, name, "not measured before")
        elif "loss" in name and (steps := steps_apart(before, held.test)):
            yield _not(held, name, steps)
        else:
            yield _judged(held, name)


def title(test: Json, metric: str) -> str:
    """``tokens_per_second[gpt]``, by the case; where the check's name adds something, with it."""
    case = test.get("case") or test["id"]
    check = test.get("check")
    return f"{metric}[{case}]" if not check else f"{metric}[{case}-{check}]"


def _judged(held: Held, name: str) -> dict[str, Any]:
    old = [Metric.of(one["metrics"][name]) for _, one in _like(held, name)]
    new = Metric.of(held.test["metrics"][name])
    try:
        judged = judge(name, old, new)
    except ValueError as error:
        return _not(held, name, str(error))
    return {
        "kind": judged.kind,
        "test": held.test["id"],
        "metric": name,
        "text": _text(held, name, judged, new),
        "old": judged.old,
        "new": judged.new,
        "relative": judged.change,
        "noise": judged.noise,
    }


def _like(held: Held, name: str) -> list[tuple[Night, Json]]:
    """The nights whose value of this metric is one of the same thing."""
    return [
        (night, one)
        for night, one in held.nights
        if name in (one.get("metrics") or {})
        and not apart(machine_of(night.report, one), held.machine)
        and not settings_apart(one, held.test)
        and not ("loss" in name and steps_apart(one, held.test))
    ]


def _text(held: Held, name: str, judged: Judged, new: Metric) -> str:
    """``tokens_per_second[gpt] is 12 % below the last good night (…): 11,200 against 12,750 tokens/s; …``."""
    where = held.where
    if judged.nights >= LEAST_NIGHTS:
        nights, last = plural(judged.nights, "good night"), held.nights[-1][0].when
        where = f"the median of the last {RECENT} of {nights} ({last})"
    divisor, unit = fitting(new.unit, judged.old)
    before = f"{number(judged.old / divisor)} {unit}".rstrip()
    if math.isnan(judged.change):
        return f"{title(held.test, name)} is not a number; in {where}: {before}"
    sides = f"{number(judged.new / divisor)} against {before}"
    return f"{title(held.test, name)} is {_change(judged.change)} {where}: {sides}; {_explained(judged)}"


def _change(change: float) -> str:
    if abs(change) < 0.0005:
        return "as in"
    share = 100 * abs(change)
    told = f"{share:.0f}" if share >= 10 else f"{share:.1f}"
    return f"{told} % {'above' if change > 0 else 'below'}"


def _explained(judged: Judged) -> str:
    noise = f"noise explains ±{100 * judged.noise:.1f} %"
    return (
        noise
        if judged.noise >= judged.least
        else f"{noise}, and less than {100 * judged.least:g} % is not told"
    )


def _not(held: Held, name: str, why: str) -> dict[str, Any]:
    text = f"{title(held.test, name)}: {why}"
    return {"kind": "not comparable", "test": held.test["id"], "metric": name, "text": text}
