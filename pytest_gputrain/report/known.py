"""A test of a report, from what is known of it: the results of its checks and its launches. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_gputrain.report.codec import decode, plain
from pytest_gputrain.report.model import MOST_POINTS, Kind, Launch, Metric, Series
from pytest_gputrain.report.reading import ReportError

METRICS, SERIES = "metrics", "series"  # the keys of a check's figures that are not for a line of text
MOST_LAUNCHES = 20  # of a test: one may launch a thousand times
MOST_MESSAGE = 64 * 1024
MOST_FIGURES = 200  # entries of one list or table among figures


@dataclass
class Known:
    """What has become known of a test while it ran; ``figures`` as its checks gave them."""

    figures: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    launches_left_out: int = 0

    def add_launch(self, launch: Launch) -> None:
        """Keeps those that did not pass before those that did."""
        self.launches.append(launch)
        if len(self.launches) > MOST_LAUNCHES:
            good = next((one for one in self.launches if one.verdict == "PASSED"), self.launches[-1])
            self.launches.remove(good)
            self.launches_left_out += 1

    def label(self, text: str) -> None:
        if text not in self.labels:
            self.labels.append(text)

    def add_figures(self, figures: Mapping[str, Any], *, simulated: bool = False) -> None:
        """The figures of a check. What they say of simulated ranks or shared GPUs becomes a label."""
        for name, value in figures.items():
            before = self.figures.get(name)
            # Of several checks and fixtures in one test all lines and metrics are kept.
            if name == SERIES and isinstance(before, list) and isinstance(value, list):
                value = [*before, *value]
            elif name == METRICS and isinstance(before, Mapping) and isinstance(value, Mapping):
                value = {**before, **value}
            self.figures[name] = value
        if simulated or "simulated ranks" in figures:
            self.label("simulated")
        if figures.get("shared_gpu"):
            self.label("shared GPU")

    def parts(self) -> dict[str, Any]:
        """``figures``, ``metrics``, ``series`` and the rest, as fields of a Test."""
        figures = {name: _bounded(plain(value)) for name, value in self.figures.items()
                   if name not in (METRICS, SERIES)}  # fmt: skip
        notes: list[str] = []
        found = {
            "metrics": _metrics(self.figures.get(METRICS) or {}, notes),
            "series": _series(self.figures.get(SERIES) or (), notes),
            "labels": tuple(self.labels),
            "launches": tuple(self.launches),
            "launches_left_out": self.launches_left_out,
        }
        return {"figures": {**figures, **({"not in the report": notes} if notes else {})}, **found}


def kind_of(check: str | None, launches: bool, stability: bool = False) -> Kind:
    """What kind of test it is."""
    if stability:
        return "stability"
    if check is not None:
        return "check"
    return "launch" if launches else "test"


def bounded(message: str) -> str:
    """The message; of a very long one its beginning and its end."""
    if len(message) <= MOST_MESSAGE:
        return message
    half = MOST_MESSAGE // 2
    return f"{message[:half]}\n[… {len(message) - 2 * half:,} characters left out …]\n{message[-half:]}"


def _bounded(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MOST_FIGURES:
        return [*value[:MOST_FIGURES], f"… {len(value) - MOST_FIGURES:,} more"]
    return value


def _metrics(given: Any, notes: list[str]) -> dict[str, Metric]:
    """Those that are metrics; of the others a note, so that nothing is lost in silence."""
    found = {}
    for name, metric in given.items() if isinstance(given, Mapping) else ():
        try:
            found[str(name)] = decode(Metric, metric, f"metrics.{name}")
        except ReportError as error:
            notes.append(str(error))
    return found


def _series(given: Any, notes: list[str]) -> tuple[Series, ...]:
    found = []
    for index, series in enumerate(given if isinstance(given, Sequence) else ()):
        try:
            found.append(_thinned(decode(Series, _finite(series), f"series[{index}]")))
        except ReportError as error:
            notes.append(str(error))
    return tuple(found)


def _finite(series: Any) -> Any:
    """Lists of numbers, null where one is not finite."""
    if not isinstance(series, Mapping) or not isinstance(series.get("y"), list | tuple):
        return series
    y = [value if not isinstance(value, float) or math.isfinite(value) else None for value in series["y"]]
    return {**series, "x": [*series.get("x", ())], "y": y}


def _thinned(series: Series) -> Series:
    """At most so many points: the first, the last, and of each stretch the lowest and the highest."""
    if len(series.x) != len(series.y):
        raise ReportError(f"series {series.label!r} has {len(series.x)} x and {len(series.y)} y")
    if series.names and len(series.names) != len(series.x):
        raise ReportError(f"series {series.label!r} has {len(series.x)} x and {len(series.names)} names")
    if len(series.x) <= MOST_POINTS:
        return series
    number, stretches = len(series.x), MOST_POINTS // 2 - 1

    def height(place: int) -> float:
        value = series.y[place]
        return -math.inf if value is None else value  # a step without a number is not lost

    found = {0, number - 1}
    for stretch in range(stretches):
        places = range(number * stretch // stretches, number * (stretch + 1) // stretches)
        found |= {min(places, key=height), max(places, key=height)}
    kept = sorted(found)
    x, y = tuple(series.x[index] for index in kept), tuple(series.y[index] for index in kept)
    return replace(series, x=x, y=y, names=tuple(series.names[index] for index in kept if series.names))
