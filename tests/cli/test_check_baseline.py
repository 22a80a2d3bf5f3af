"""``gputrain check --baseline`` on real checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.cli.check_baseline import this_machine
from tests.report.nights_made import entry, report, speed

CASE = """
import torch
from pytest_gputrain import TrainingCase

def made(name, kept):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
                for _ in range(kept):  # activations of no use
                    x = x * x.sigmoid()
            return x

    return TrainingCase(
        name=name, model=Model, batch=lambda n, device: torch.randn(n, 64, device=device),
        loss=lambda model, batch: model(batch).square().mean(),
    )

gpt = made("gpt", 0)
fat = made("gpt", 3)
"""


def check(spec: str, baseline: Path, *more: str) -> int:
    return main(["check", spec, "--checks", "batch_size_found", "--baseline", str(baseline), *more])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gated_cases.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_memory_that_a_change_costs_is_caught(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The healthy run of the same code is green; the one with more activations is not."""
    out = folder / "out.json"
    spec = "gated_cases:gpt"
    assert main(["check", spec, "--checks", "batch_size_found", "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    metrics = result["figures"].pop("metrics")
    night = report(entry(check="batch_size_found", metrics=metrics, figures=result["figures"]))
    night["machines"] = [this_machine()]
    baseline = folder / "report.json"
    baseline.write_text(json.dumps(night))
    assert check(spec, baseline) == 0
    assert "== baseline: passed\nno regression from the last good night" in capsys.readouterr().out
    assert check("gated_cases:fat", baseline) == 1
    said = capsys.readouterr().out.partition("== baseline: failed\n")[2].splitlines()[0]
    assert said.startswith("bytes_per_sample[gpt-batch_size_found] is ")
    assert "% above the last good night" in said


def no_night(**more: Any) -> dict[str, Any]:
    made = report(entry(check="batch_size_found", metrics={"peak_bytes_at_2": speed(1.0)}), **more)
    if "cpu" not in more:
        made["machines"] = [{**this_machine(), "commit": None}]
    return made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"schema": "gputrain.report", "version": 7}),
         "--baseline: {} is of version 7 of the report, this reads version 1; use the gputrain that wrote "
         "it, or write it again"),
        ('{"schema": "gputrain.rep',
         "--baseline: {} is not JSON (Unterminated string starting at in line 1): cut off or edited"),
        ("hardware", "--baseline {} is no good night for this run: it is of other hardware or torch: "
         "GPUs 1 x H200 against none; CPU Xeon against "),
        ("failed",
         "--baseline {} is no good night for this run: it failed (2026-11-28); give one that passed"),
        ("checks", "--baseline {} is no good night for this run: it has none of the asked checks on cpu "
         "(2026-11-28)"),
    ],
    ids=["version", "corrupt", "hardware", "failed", "checks"],
)  # fmt: skip
def test_a_bad_baseline_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    made = {"hardware": no_night(cpu="Xeon"), "failed": no_night(verdict="failed"), "checks": no_night()}
    if text == "checks":
        made["checks"]["tests"][0]["check"] = "tp_memory"
    baseline = folder / "report.json"
    baseline.write_text(json.dumps(made[text]) if text in made else text)
    assert check("gated_cases:gpt", baseline) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith(f"gputrain check: {said.format(baseline)}")


def test_bad_baselines_end_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night = report(entry(case="other", check="batch_size_found"))
    night["machines"] = [{**this_machine(), "commit": None}]
    baseline = folder / "report.json"
    baseline.write_text(json.dumps(night))
    assert check("gated_cases:gpt", baseline) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err == (
        f"gputrain check: --baseline {baseline} is no good night for this run: it has no case 'gpt'; "
        "it has other (2026-11-28)\n"
    )
