"""What real checks and fixtures measure reaches the page: no plot that only a made-up report can have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gputrain.report.files import load

TESTS = """
import torch
from pytest_gputrain import TrainingCase

case = TrainingCase(name="line", model=lambda: torch.nn.Linear(64, 64),
                    batch=lambda n, device: torch.randn(n, 64, device=device),
                    loss=lambda model, batch: model(batch).square().mean())

def test_finds(batch_finder):
    assert batch_finder(case, capacity="2MB", max_batch_size=8).size == 8

def test_compiles(compile_monitor):
    with compile_monitor() as monitor:
        compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager", dynamic=False)
        for step in range(4):
            monitor.step(step)
            compiled(torch.randn(2 + step // 2, 4))
"""


@pytest.mark.slow
@pytest.mark.skipif("sys.platform != 'linux'", reason="launches ranks")
def test_checks_of_the_reference_model_have_their_plots(tmp_path: Path) -> None:
    ids = "batch_size_found,compile_no_recompiles,compile_parity,tp_backward,tp_memory,tp_training"
    spec = "pytest_gputrain.reference.gpt:case"
    command = [sys.executable, "-m", "pytest_gputrain", "check", spec, "--checks", ids, "--report", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    report = load(tmp_path / "out")
    drawn = {test.check: sorted({series.plot for series in test.series}) for test in report.tests}
    assert drawn == {
        "batch_size_found": ["ladder"], "compile_no_recompiles": ["recompiles"],
        "compile_parity": ["loss", "step_seconds"], "tp_backward": ["tp_gradient_error"],
        "tp_memory": ["memory"], "tp_training": ["loss"],
    }  # fmt: skip
    by_check = {test.check: test for test in report.tests}
    assert all(test.figures.get("not in the report") is None for test in report.tests)
    ladder = by_check["batch_size_found"].series[0]
    assert ladder.limit is not None
    assert any(peak is not None and peak > ladder.limit for peak in ladder.y)
    assert "blocks.0.attention.to_key" in by_check["tp_backward"].series[0].names
    page = (tmp_path / "out" / "index.html").read_text()
    for said in ("gpt: 2 tests over each other", ">memory budget ", ">tolerance ", "Recompiles"):
        assert said in page


@pytest.mark.slow
def test_fixtures_have_their_plots(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gputrain", "--gputrain-report=out", "-q"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    finds, compiles = sorted(load(tmp_path / "out").tests, key=lambda test: test.id, reverse=True)
    [ladder], [graphs] = finds.series, compiles.series
    assert (ladder.plot, ladder.x[-1], ladder.limit_label) == ("ladder", 8.0, "memory limit")
    assert ladder.limit is not None
    assert 0 < (ladder.y[0] or 0) < ladder.limit
    assert (graphs.plot, graphs.y) == ("recompiles", (1.0, 0.0, 1.0, 0.0))
