"""The report of the tensor-parallel tests: what it counts and shows; a run of nothing is never green."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gputrain.report.tp_report import Line, RankMemory, Report, write

REPORT = Report(
    title="opt-125m",
    ranks="2 gloo ranks",
    date="2026-11-29 01:00:00",
    tests=[
        Line("tp_forward", "passed", 12.34, {"largest difference": 2.1e-6, "inputs": 4, "table": [1, 2]}),
        Line("tp_backward", "failed", 20.0, message="layers.3.fc1.weight.grad is off by 57 %\n  more"),
        Line("tp_memory", "skipped", 0.0, message="no tensor-parallel plan given"),
    ],
    layers={"embed": 1e-7, "layers.0.fc1": 0.57, "layers.1.fc1": 0.0},
    tolerance=1e-4,
    memory=[RankMemory(60, 240), RankMemory(60, 240)],
    whole=RankMemory(100, 400),
    origin={"cpu": "EPYC", "gpus": None},
)
TEXT = """\
Tensor parallel: opt-125m, 2 gloo ranks
Date:         2026-11-29 01:00:00
Total:        3
Passed:       1
Failed:       1
Skipped:      1
Success rate: 50.0%
Time:         32.3 s

PASSED     12.3 s  tp_forward  largest difference 2.1e-06, inputs 4
FAILED     20.0 s  tp_backward  layers.3.fc1.weight.grad is off by 57 %
SKIPPED     0.0 s  tp_memory  no tensor-parallel plan given

Gradient error by layer, relative; a bar of 3 is a factor of 10 over 1e-13; allowed 1e-04
  embed          1.00e-07  ##################
  layers.0.fc1   5.70e-01  ######################################  <- too large
  layers.1.fc1   0.00e+00  ###

Memory by rank
  rank   parameters        bytes  of the whole
     0           60          240         60.0%
     1           60          240         60.0%
   sum          120          480
  whole         100          400
  overhead (sum - whole) / whole = 20.0%

Measured on: cpu EPYC
"""


def test_report_is_written_whole(tmp_path: Path) -> None:
    path = write(REPORT, tmp_path / "out" / "opt125m_test_report.txt")
    assert path.read_text() == TEXT
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["passed", "skipped"], 0),
        (["passed", "failed"], 1),
        (["passed", "error"], 1),
        (["skipped"], 5),
        ([], 5),
    ],
)
def test_exit_code_is_0_only_if_something_ran_and_all_passed(outcomes: list[str], code: int) -> None:
    report = replace(REPORT, tests=[Line("x", outcome, 1.0) for outcome in outcomes])
    assert report.exit_code == code


def test_success_rate_of_nothing() -> None:
    assert "Success rate: nothing ran" in replace(REPORT, tests=[Line("x", "skipped", 0.0)]).text()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pytest_gputrain.report.tp_plot import draw

    draw(REPORT, tmp_path / f"gradients{suffix}")
    draw(replace(REPORT, layers={}, memory=(), whole=None), tmp_path / f"nothing{suffix}")
    assert (tmp_path / f"gradients{suffix}").stat().st_size > 2000
    assert len(list(tmp_path.iterdir())) == 2
