"""The two tables of the page: case × check with figures, and every test by file, compact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.report.page_failures import BAD, title
from pytest_gputrain.report.page_text import anchor, clean, cut_line
from pytest_gputrain.report.quantities import duration, plural, quantity

_MOST_CELLS = 2500
_MOST_ROWS = 20_000
_CHUNK = 500  # rows of a group; closed groups cost no layout
_ID_CHARACTERS, _NOTE_CHARACTERS = 1_300_000, 700_000  # of all rows together
_FIRST_NAMES = ("tokens_per_second", "step_seconds", "final_loss", "peak_bytes")


@dataclass(frozen=True)
class Cell:
    """Of one test. ``target``: where on the page more is said."""

    outcome: str
    target: str
    figures: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True)
class Matrix:
    """``rows``: name and cells by column, empty where nothing ran. ``left_out`` tests did not fit."""

    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    left_out: int


@dataclass(frozen=True)
class Row:
    anchor: str  # "" where the test's place is elsewhere on the page, or nothing points to it
    link: str
    name: str
    outcome: str
    seconds: str
    note: str
    labels: Sequence[str]


@dataclass(frozen=True)
class Group:
    name: str
    counts: str
    bad: int
    seconds: str
    rows: Sequence[Row]


def matrix(tests: Sequence[Mapping[str, Any]]) -> Matrix | None:
    """Case × check, the longer of the two downwards; None where no check ran."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    for test in tests:
        if test.get("case") and test.get("check"):
            device = f" · {clean(test['device'])}" if test.get("device") else ""
            key = cut_line(clean(test["case"]) + device, 80), cut_line(clean(test["check"]), 80)
            cells.setdefault(key, []).append(_cell(test))
    if not cells:
        return None
    cases, checks = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    down, across, flip = (checks, cases, True) if len(checks) >= len(cases) else (cases, checks, False)
    across = across[:60]
    down = down[: max(1, _MOST_CELLS // len(across))]
    rows = [
        (one, [cells.get((other, one) if flip else (one, other), []) for other in across]) for one in down
    ]
    shown = sum(len(cell) for _, row in rows for cell in row)
    corner = "check" if flip else "case"
    return Matrix(corner, across, rows, sum(map(len, cells.values())) - shown)


def groups(tests: Sequence[Mapping[str, Any]], placed: Collection[str]) -> tuple[list[Group], int]:
    """All tests by file or case, failed ones first in each; and how many did not fit.

    ``placed``: anchors that are elsewhere on the page.
    """
    ordered = sorted(tests, key=lambda test: test.get("outcome") not in BAD)
    kept = ordered[:_MOST_ROWS]
    by_file: dict[str, list[Mapping[str, Any]]] = {}
    for test in kept:
        by_file.setdefault(str(test["id"]).partition("::")[0], []).append(test)
    noted = sum(1 for test in kept if test.get("outcome") != "passed")
    longest = min(300, max(40, _ID_CHARACTERS // max(1, len(kept))))
    note = min(400, max(60, _NOTE_CHARACTERS // max(1, noted)))
    found = []
    for name, members in sorted(by_file.items()):
        for start in range(0, len(members), _CHUNK):
            part = members[start : start + _CHUNK]
            which = f" ({start + 1:,}–{start + len(part):,})" if len(members) > _CHUNK else ""
            found.append(_group(cut_line(clean(name), 200) + which, part, placed, longest, note))
    return found, len(ordered) - len(kept)


def _group(
    name: str, tests: Sequence[Mapping[str, Any]], placed: Collection[str], longest: int, note: int
) -> Group:
    counts = Counter(clean(test.get("outcome")) for test in tests)
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
    seconds = duration(sum(test.get("seconds") or 0.0 for test in tests))
    bad = sum(counts[outcome] for outcome in BAD)
    return Group(name, told, bad, seconds, [_row(test, placed, longest, note) for test in tests])


def _row(test: Mapping[str, Any], placed: Collection[str], longest: int, note: int) -> Row:
    outcome, place = clean(test.get("outcome")), anchor(test["id"])
    _, mark, name = str(test["id"]).partition("::")
    elsewhere = place in placed
    pointed_at = not elsewhere and (outcome in BAD or bool(test.get("check")))
    return Row(
        place if pointed_at else "",
        place if elsewhere else "",
        cut_line(clean(name if mark else test["id"]), longest),
        outcome,
        duration(test.get("seconds") or 0.0),
        _note(test, outcome, note),
        [cut_line(clean(label), 40) for label in (test.get("labels") or ())[:4]],
    )


def _note(test: Mapping[str, Any], outcome: str, most: int) -> str:
    """Why it did not pass; else its figures, else its ranks."""
    if outcome != "passed":
        return cut_line(title(test), most)
    if told := figures(test, 3):
        return " · ".join(told)
    launches = test.get("launches") or ()
    ranks = [one for launch in launches for one in launch.get("ranks") or ()]
    if not ranks:
        return ""
    peak = max((one.get("peak_bytes") or 0 for one in ranks), default=0)
    several = f"{len(launches)} launches, " if len(launches) > 1 else ""
    return f"{several}{plural(len(ranks), 'rank')}" + (f", peak {quantity(peak, 'bytes')}" if peak else "")


def figures(test: Mapping[str, Any], most: int) -> list[str]:
    """The metrics of a test, those that people look for first."""
    metrics = test.get("metrics") or {}
    places = {name: place for place, name in enumerate(_FIRST_NAMES)}
    names = sorted(metrics, key=lambda name: (places.get(name, len(places)), name))
    found = []
    for name in names[:most]:
        value, unit = metrics[name].get("value"), str(metrics[name].get("unit") or "")
        if isinstance(value, (int, float)):
            plain = name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
            said = "" if unit and unit == name.replace("_per_", "/").replace("second", "s") else f"{plain}: "
            found.append(cut_line(clean(said + quantity(value, unit)), 60))
    return found


def _cell(test: Mapping[str, Any]) -> Cell:
    labels = [cut_line(clean(label), 30) for label in (test.get("labels") or ())[:3]]
    return Cell(clean(test.get("outcome")), anchor(test["id"]), figures(test, 2), labels)
