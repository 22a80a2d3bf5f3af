"""``--baseline``: which nights are held against, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.report.gate import Baseline, open_baseline
from pytest_gputrain.report.reading import ReportError
from tests.report.nights_made import MACHINE, entry, report, speed


def nights(folder: Path, *reports: dict[str, Any]) -> Path:
    for number, one in enumerate(reports):
        night = folder / f"n{number}"
        night.mkdir()
        (night / "report.json").write_text(json.dumps(one))
    return folder


def night(value: float, day: int, **fields: Any) -> dict[str, Any]:
    return report(entry(metrics={"tokens_per_second": speed(value)}), day=day, **fields)


def opened(path: Path, case: str = "gpt", check: str = "stable_training") -> Baseline:
    return open_baseline(path, cases=[case], checks=[check], machine=MACHINE, device="cpu")


def now(value: float) -> dict[str, Any]:
    return entry(metrics={"tokens_per_second": speed(value)})


def test_a_regression_is_the_first_line(tmp_path: Path) -> None:
    gate = opened(nights(tmp_path, night(12750, 28))).judge([now(11200)], MACHINE)
    assert gate.outcome == "failed"
    assert gate.lines[0].startswith(
        "tokens_per_second[gpt-stable_training] is 12 % below the last good night (2026-11-28, 4d1c2ab): "
        "11,200 against 12,750 tokens/s; noise explains ±4.2 %"
    )


def test_an_improvement_is_told(tmp_path: Path) -> None:
    gate = opened(nights(tmp_path, night(1000, 28))).judge([now(1500)], MACHINE)
    assert gate.outcome == "passed"
    assert gate.lines[0].startswith("no regression from the last good night (2026-11-28, 4d1c2ab): 0 worse")
    assert gate.lines[1].startswith("better: tokens_per_second[gpt-stable_training] is 50 % above")


def test_nothing_compared_is_not_green(tmp_path: Path) -> None:
    other = entry(metrics={"tokens_per_second": speed(1000)}, figures={"world_size": 8})
    gate = opened(nights(tmp_path, night(1000, 28))).judge([other], MACHINE)
    assert (gate.outcome, gate.nothing_compared) == ("skipped", True)
    assert gate.message == (
        "nothing was compared with the last good night (2026-11-28, 4d1c2ab): "
        "tokens_per_second[gpt-stable_training]: world size not given against 8"
    )


def test_what_no_longer_runs_is_a_regression(tmp_path: Path) -> None:
    skipped = entry(outcome="skipped", message="no plan given")
    gate = opened(nights(tmp_path, night(1000, 28))).judge([skipped], MACHINE)
    assert gate.message == "gpt::stable_training: no longer runs, was passed: no plan given"


def test_failed_incomplete_and_foreign_nights_are_left_out(tmp_path: Path) -> None:
    cut = night(500, 26)
    cut["session"]["complete"] = False
    path = nights(
        tmp_path, night(1000, 24), night(500, 25, verdict="failed"), cut, night(500, 27, cpu="Xeon"),
        report(entry(case="opt"), day=28),
    )  # fmt: skip
    baseline = opened(path)
    assert [one.date for one in baseline.nights] == ["2026-11-24"]
    assert len(baseline.notes) == 4
    assert baseline.judge([now(850)], MACHINE).outcome == "failed"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (night(1, 28, verdict="failed"), "it failed (2026-11-28, 4d1c2ab); give one that passed"),
        (report(entry(case="opt"), entry(case="vit")), "it has no case 'gpt'; it has opt, vit"),
        (night(1, 28, cpu="Xeon"), "it is of other hardware or torch: CPU Xeon against EPYC"),
        (report(entry(check="ddp_parity")), "it has none of the asked checks on cpu"),
        (report(entry()), "none of the asked checks measured anything in it"),
    ],
)
def test_a_baseline_that_is_none(tmp_path: Path, made: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError) as error:
        opened(nights(tmp_path, made))
    assert str(error.value).startswith(f"--baseline {tmp_path} is no good night for this run: {said}")
    assert "\n" not in str(error.value)


def test_a_corrupt_baseline(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{")
    with pytest.raises(ReportError, match=r"^--baseline: .*report.json is not JSON"):
        opened(path)


def test_a_change_for_the_worse_is_accepted_by_naming_its_report(tmp_path: Path) -> None:
    first = opened(nights(tmp_path, night(1000, 27)))
    gate = first.judge([now(800)], MACHINE)
    kept = report(now(800), dict(gate.entry()), day=28, verdict="failed")
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "report.json").write_text(json.dumps(kept))
    assert opened(tmp_path).judge([now(810)], MACHINE).outcome == "failed"
    assert opened(tmp_path / "n1" / "report.json").judge([now(810)], MACHINE).outcome == "passed"
