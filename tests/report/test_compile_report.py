"""Eager against compiled: table and picture, from documents as the checks leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.report import ladder_plot
from pytest_gputrain.report.compile_plot import Curves, draw
from pytest_gputrain.report.compile_report import write_report

MONITOR: dict[str, Any] = {
    "graphs": [{}, {}],
    "breaks": [{"step": 4, "phase": "train"}],
    "recompiles": [
        {"reason": "size  mismatch at\nindex 1", "function": "forward", "location": "net.py:3", "step": 7,
         "phase": "train"},
        {"reason": "training == True", "function": "forward", "location": "net.py:3", "step": 0,
         "phase": "single steps"},
    ],
    "steps": [{"step": step, "phase": "train", "compile_seconds": 2.0 * (step == 7)} for step in range(20)],
    "compile_seconds": 4.5,
}  # fmt: skip
PARITY: dict[str, Any] = {
    "case": "gpt", "device": "cpu", "kind": "parity", "backend": "aot_eager", "unit": "tokens",
    "eager": [2.0] * 20, "compiled": [2.0] * 19 + [2.25], "tokens": 100, "useful": 60,
    "step_seconds": {"eager": [0.5] * 8 + [0.2] * 12, "compiled": [9.0] * 8 + [0.1] * 12},
    "monitor": MONITOR, "origin": {"torch": "2.13", "commit": "abc"},
}  # fmt: skip
SPEED: dict[str, Any] = {
    "case": "gpt", "device": "cuda", "kind": "speed", "world_size": 1, "warm_up": 6, "tokens_per_step": 8192,
    "useful_per_step": 6000, "ratio": {"median": 1.5, "low": 1.4, "high": 1.6, "each": [1.5] * 10},
    "eager": {"step_seconds": [0.3, 0.3], "tokens_per_second": 27306.7, "useful_per_second": 20000.0,
              "peak_bytes": 2**30},
    "compiled": {"step_seconds": [0.2, 0.2], "tokens_per_second": 40960.0, "useful_per_second": 30000.0,
                 "peak_bytes": 2**29},
    "first_compile_seconds": 31.0, "graphs": 2, "breaks": 0, "recompiles": ["a reason"], "origin": {},
}  # fmt: skip


def put(folder: Path, *documents: dict[str, Any]) -> None:
    for number, document in enumerate(documents):
        (folder / f"{number}.json").write_text(json.dumps(document))


def test_the_table_of_a_comparison_leaves_out_what_compiled(tmp_path: Path) -> None:
    put(tmp_path, PARITY)
    page = write_report(tmp_path)[0].read_text()
    assert "## gpt, cpu" in page
    assert "the first 8 left out: no measurement of speed" in page
    for row in (
        "| tokens/s | 500 | 1,000 |",
        "| useful tokens/s | 300 | 600 |",
        "| step time, p50 | 200 ms | 100 ms |",
        "| peak memory | not measured | not measured |",
        "| recompiles |  | 2 |",
        "- size mismatch at index 1 of forward at net.py:3, train step 7",
        "Loss after 20 steps: 2 eager, 2.25 compiled; the largest difference of a step is 0.25.",
    ):
        assert row in page


def test_the_table_of_a_measurement(tmp_path: Path) -> None:
    put(tmp_path, SPEED, {**SPEED, "kind": "speed2", "world_size": 2})
    page = write_report(tmp_path)[0].read_text()
    assert "**1.50 times as fast** (1.40 to 1.60, 10 pairs of blocks)" in page
    assert "2 ranks" in page
    for row in ("| tokens/s | 27,307 | 40,960 |", "| peak memory | 1,024 MiB | 512 MiB |", "- a reason"):
        assert row in page


def test_what_is_no_report_is_passed_over(tmp_path: Path) -> None:
    assert write_report(tmp_path) == []
    put(tmp_path, {"case": "x"}, {"case": "x", "device": "cpu", "kind": "other"})
    (tmp_path / "half.json").write_text("{")
    assert write_report(tmp_path) == []


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_plot, "missing", lambda: "a plot needs matplotlib")
    put(tmp_path, PARITY)
    (page,) = write_report(tmp_path)
    assert "a plot needs matplotlib" in page.read_text()


def test_the_picture_shows_both_losses_and_the_recompiles(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    put(tmp_path, PARITY)
    page, picture = write_report(tmp_path)
    assert f"]({picture.name})" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "curves.svg"
    draw(Curves("gpt", PARITY["eager"], PARITY["compiled"], [7, 7], [4]), path)
    text = path.read_text()
    for words in ("gpt", "recompiles: 2", "graph breaks: 1", "equal", "eager", "compiled"):
        assert words in text


def test_equal_curves_and_no_events_are_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(Curves("gpt", [1.0], [1.0]), tmp_path / "same.svg")
    text = (tmp_path / "same.svg").read_text()
    assert "no difference in any step" in text
    assert "no recompiles, no graph breaks" in text
    assert [path.name for path in tmp_path.iterdir()] == ["same.svg"]
