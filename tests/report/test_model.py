"""The report as JSON: its schema, what it refuses, what becomes of values that JSON does not know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.report import files
from pytest_gputrain.report.codec import plain
from pytest_gputrain.report.gather import gather
from pytest_gputrain.report.known import MOST_LAUNCHES, Known
from pytest_gputrain.report.model import MOST_POINTS, Launch, Report
from pytest_gputrain.report.reading import ReportError
from pytest_gputrain.report.records import read_records
from pytest_gputrain.report.schema import published, schema
from pytest_gputrain.report.summary import MOST_BYTES, summary

from .page_reports import large, night
from .records_made import Session, a_test


def a_report(folder: Path, *tests: dict[str, Any]) -> Report:
    Session(folder).run(*(tests or (a_test("a"),))).end()
    return gather(read_records(folder))


def test_the_published_schema_is_the_model() -> None:
    assert published() == schema()


def test_reports_hold_to_the_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    check = jsonschema.Draft202012Validator(published())
    check.check_schema(published())
    document = files.to_json(a_report(tmp_path))
    check.validate(document)
    assert not check.is_valid({**document, "verdict": "green"})
    assert not check.is_valid({**document, "version": 2})


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    metric = {"value": 1.5, "unit": "s", "better": "lower"}
    launch = {"verdict": "HUNG", "seconds": 2.0, "ranks": [{"rank": 0, "outcome": "ended", "seconds": 1}],
              "cause": {"rank": 1, "kind": "left", "message": "never came"}}  # fmt: skip
    test = a_test("a", "failed", metrics={"step": metric}, launches=[launch], figures={"n": [1, {"x": None}]})
    report = a_report(tmp_path, test)
    path = files.write(report, tmp_path)
    assert files.load(path) == files.load(tmp_path) == report
    assert sum(line.startswith('{"id"') for line in path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": [a_test("a", "green")]},
         "tests[0].outcome is 'green'; it has to be one of passed, failed, skipped, error, crashed"),
        ({"tests": [{"id": "a"}]}, "tests[0].kind is missing"),
        ({"tests": [a_test("a", seconds="1")]}, "tests[0].seconds is '1'; it has to be a number"),
        ({"tests": [a_test("a", machine=3)]},
         "tests[0].machine is 3; it has to be one of the 1 machines, counted from 0"),
        ({"session": {}}, "session.id is missing"),
        ({"not_run": "none"}, "not_run is 'none'; it has to be a list"),
    ],
    ids=["choice", "missing", "number", "machine", "session", "list"],
)  # fmt: skip
def test_what_is_no_report_is_told_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    document = {**files.to_json(a_report(tmp_path)), **change}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError) as caught:
        files.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_values_that_are_no_json_become_text() -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError

    given = {1: math.nan, "inf": -math.inf, "odd": Odd(), "path": Path("a"), "set": {1}, "yes": True}
    assert plain(given) == {"1": "nan", "inf": "-inf", "odd": "<Odd>", "path": "a", "set": [1], "yes": True}


def test_what_a_check_hands_over() -> None:
    known = Known()
    steps = list(range(2000))
    line = {
        "plot": "loss",
        "label": "rank 0",
        "unit": "",
        "x": steps,
        "y": [math.nan, *map(float, steps[1:])],
    }
    metric = {"value": 3.0, "unit": "tokens/s", "better": "higher"}
    known.add_figures({"steps": 2000, "simulated ranks": 2, "metrics": {"speed": metric, "odd": {"value": 1}},
                       "series": [line, {"plot": "pie"}]})  # fmt: skip
    parts = known.parts()
    assert parts["figures"] == {
        "steps": 2000,
        "simulated ranks": 2,
        "not in the report": ["metrics.odd.unit is missing", "series[1].plot is 'pie'; it has to be one of "
                              "loss, step_seconds, tokens_per_second, mfu, memory, ladder, recompiles, "
                              "tp_gradient_error"],
    }  # fmt: skip
    assert parts["labels"] == ("simulated",)
    assert parts["metrics"]["speed"].better == "higher"
    [series] = parts["series"]
    assert MOST_POINTS - 4 <= len(series.x) <= MOST_POINTS
    assert (series.x[-1], series.y[0]) == (1999, None)


def test_a_thinned_series_keeps_its_spike_and_the_step_without_a_number() -> None:
    y = [1.0] * 5000
    y[1234], y[3456] = 100.0, math.nan
    known = Known()
    known.add_figures({"series": [{"plot": "loss", "label": "a", "unit": "", "x": [*range(5000)], "y": y}]})
    known.add_figures({"series": [{"plot": "loss", "label": "b", "unit": "", "x": [0], "y": [1.0]}]})
    long, short = known.parts()["series"]  # of two checks in one test both
    assert len(long.x) <= MOST_POINTS
    assert {(1234.0, 100.0), (3456.0, None)} <= {*zip(map(float, long.x), long.y, strict=True)}
    assert short.label == "b"


def test_launches_that_failed_are_kept_before_those_that_passed() -> None:
    known = Known()
    for number in range(MOST_LAUNCHES + 5):
        known.add_launch(Launch("HUNG" if number == 3 else "PASSED", float(number)))
    assert len(known.launches) == MOST_LAUNCHES
    assert [launch.seconds for launch in known.launches if launch.verdict == "HUNG"] == [3.0]
    assert known.launches_left_out == 5


def test_a_summary_tells_the_verdict_first_and_stays_small(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | @everyone **bold**\nsecond line"
    check = a_test("a", "failed", kind="check", case="gpt", check="ddp_parity", device="cpu", message=hostile)
    good = a_test("b", kind="check", case="gpt", check="tp_forward", device="cpu", figures={"error": 1e-7})
    text = summary(a_report(tmp_path, check, good, a_test("c", "skipped", message="needs 2 GPUs, found 0")))
    assert text.startswith("## gputrain: ❌ failed\n\n1 failed, 1 passed, 1 skipped in ")
    assert "H200 · torch 2.13.0 · commit 4d1c2ab (node1)" in text
    assert "- 1 test: needs 2 GPUs, found 0" in text
    assert r"- **a** failed: \<script\>alert(1)\</script\> \|" in text
    assert "| tp\\_forward | ✅ error 1e-07 |" in text
    assert "@everyone" not in text
    assert "second line" not in text


def test_a_gate_stands_below_the_table_for_it_is_of_no_case(tmp_path: Path) -> None:
    good = a_test("b", kind="check", case="gpt", check="tp_forward", device="cpu")
    gate = a_test(
        "baseline", kind="check", check="baseline", message="no regression from the last good night"
    )
    text = summary(a_report(tmp_path, good, gate))
    assert "| check | gpt, cpu |\n" in text
    assert "\n\n✅ baseline: no regression from the last good night\n" in text


@pytest.mark.parametrize("document", [night(), large(2000, 2, failing=True)], ids=["night", "large"])
def test_reports_of_the_pages_tests_are_reports(tmp_path: Path, document: dict[str, Any]) -> None:
    """What the page is tested with is what the model says."""
    from pytest_gputrain.report.codec import decode

    head = files.to_json(a_report(tmp_path))
    document = {**document, "machines": head["machines"], "session": head["session"]}
    report = decode(Report, document)
    assert len(summary(report).encode()) <= MOST_BYTES
