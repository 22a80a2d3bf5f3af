"""``index.html``: the report as one file that people open in the morning, on a phone as well.

The verdict first, then causes, what did not run, checks, failures, plots, every test. Nothing is fetched: the
page's own policy forbids it. It can be read without JavaScript, which filters and opens what an address
points to. Its size is bounded (`page_failures`, `page_tables`, `page_plots` say by what), and the page says
what it left out. Every text of the report is hostile until escaped.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_gputrain.report.files import write_text
from pytest_gputrain.report.page_compared import Differences, compared_shown
from pytest_gputrain.report.page_failures import Cause, causes
from pytest_gputrain.report.page_nights import NightLike, strip
from pytest_gputrain.report.page_plots import panels
from pytest_gputrain.report.page_tables import groups, matrix
from pytest_gputrain.report.page_text import clean, cut_line
from pytest_gputrain.report.quantities import duration, plural

PAGE = "index.html"
_FEW = 40  # tests: their table is open from the start


def write_page(
    report: Mapping[str, Any],
    folder: Path,
    *,
    compared: Differences | None = None,
    nights: Sequence[NightLike] = (),
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``folder/index.html``, whole or not at all, and return it. ``report``: as in ``report.json``.

    earlier: the tests of the report that it was compared with, for the plots. Raises OSError.
    """
    text = page(report, compared=compared, nights=nights, earlier=earlier)
    return write_text(folder / PAGE, text)


def page(
    report: Mapping[str, Any],
    *,
    compared: Differences | None = None,
    nights: Sequence[NightLike] = (),
    earlier: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text."""
    from jinja2 import Environment

    css, js, html = (
        (files(__package__) / "templates" / f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    template = Environment(autoescape=True, trim_blocks=True).from_string(html)
    return template.render(
        css=css, js=js, policy=_policy(css, js), **_view(report, compared, nights, earlier)
    )


def _policy(css: str, js: str) -> str:
    """Only our own style and script, by their hashes; nothing is fetched or sent."""
    return (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(js)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _view(
    report: Mapping[str, Any],
    compared: Differences | None,
    nights: Sequence[NightLike],
    earlier: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    tests: Sequence[Mapping[str, Any]] = report.get("tests") or ()
    session: Mapping[str, Any] = report.get("session") or {}
    machines = [
        cut_line(clean(one.get("label") or one.get("host") or "?"), 300)
        for one in report.get("machines") or ()
    ]
    found = causes(tests)
    placed = {one.anchor for cause in found for one in cause.full} | {
        place for cause in found for place, _, _ in cause.lines
    }
    drawn, panels_left_out = panels(tests, report.get("machines") or (), machines, earlier)
    told, rows_left_out = groups(tests, placed)
    return {
        **_top(report, session),
        "machines": machines,
        "causes": [_Shown(cause) for cause in found],
        "silent": sum(1 for cause in found if not cause.full and not cause.lines),
        "not_run": [_not_run(one) for one in report.get("not_run") or ()],
        "compared": compared and compared_shown(compared),
        "matrix": matrix(tests),
        "panels": drawn,
        "panels_left_out": panels_left_out,
        "nights": nights,
        "strip": strip(nights) if nights else "",
        "groups": told,
        "opened": len(tests) <= _FEW,
        "rows_left_out": rows_left_out,
        "command": cut_line(clean(shlex.join(map(str, session.get("command") or ()))), 600),
    }


class _Shown:
    """A cause, with where on the page its first test is."""

    def __init__(self, cause: Cause) -> None:
        self.line, self.count, self.full, self.lines = cause.line, cause.count, cause.full, cause.lines
        self.more = cause.more
        self.target = cause.full[0].anchor if cause.full else cause.lines[0][0] if cause.lines else ""


def _top(report: Mapping[str, Any], session: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict in words, its numbers, when."""
    totals: Mapping[str, Any] = report.get("totals") or {}
    counts = [
        (name, int(totals.get(name) or 0)) for name in ("failed", "error", "crashed", "passed", "skipped")
    ]
    counts = [(name, count) for name, count in counts if count]
    verdict = str(report.get("verdict") or "incomplete")
    bad = sum(count for name, count in counts if name in ("failed", "error", "crashed"))
    ran = bad + int(totals.get("passed") or 0)
    notes = [cut_line(clean(note), 600) for note in (session.get("notes") or ())[:20]]
    so_far = (
        [f"{plural(bad, 'test')} failed so far."] if bad and verdict in ("interrupted", "incomplete") else []
    )
    return {
        "verdict": verdict if verdict in _HEADLINES else "incomplete",
        "headline": _HEADLINES.get(verdict, _HEADLINES["incomplete"])(ran, bad),
        "explained": [*_ending(session), *so_far, *notes],
        "counts": counts,
        "when": clean(session.get("started") or "")
        .replace("T", " ")
        .partition(".")[0]
        .removesuffix("+00:00"),
        "seconds": duration(session.get("seconds") or totals.get("seconds") or 0.0),
    }


_HEADLINES: dict[str, Callable[[int, int], str]] = {
    "passed": lambda ran, bad: f"{plural(ran, 'test')} passed" if ran == 1 else f"All {ran:,} tests passed",
    "failed": lambda ran, bad: f"{bad:,} of {plural(ran, 'test')} failed" if bad else "Failed",
    "nothing_ran": lambda ran, bad: "Nothing ran",
    "interrupted": lambda ran, bad: f"Interrupted after {plural(ran, 'test')}",
    "incomplete": lambda ran, bad: f"Incomplete: {plural(ran, 'test')} ended",
}


def _ending(session: Mapping[str, Any]) -> list[str]:
    said = {
        "interrupted": "The session was interrupted; what had not begun is missing here.",
        "worker_died": "A worker died; what it ran last has no outcome of its own.",
        "killed": "The session was killed before its end; this was put together from what it had written.",
    }
    told = said.get(str(session.get("ending")))
    return [told] if told else []


def _not_run(one: Mapping[str, Any]) -> dict[str, Any]:
    count = one.get("count") or len(one.get("tests") or ())
    return {
        "reason": cut_line(clean(one.get("reason") or "no reason given"), 1000),
        "count": plural(count, "test"),
        "tests": [cut_line(clean(test), 300) for test in (one.get("tests") or ())[:10]],
    }
