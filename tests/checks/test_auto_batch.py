"""The shipped tests of automatic batch size: they pass as they are, and each of them is able to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_gputrain.checks import throughput
from tests.planted.plug_broken_train import PLANTED
from tests.plugin.conftest import ROOT, Run, _no_settings_of_the_caller

linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
__all__ = ["_no_settings_of_the_caller"]
MODULE = str(ROOT / "pytest_gputrain" / "checks" / "test_auto_batch.py")
SHIPPED = len(PLANTED)

CASES = """
import torch
from pytest_gputrain import TrainingCase

def batch(batch_size, device):
    return {"x": torch.randn(batch_size, 400, device=device), "y": torch.randn(batch_size, 1, device=device)}

def model():
    layers = [torch.nn.Linear(400, 400), torch.nn.BatchNorm1d(400), torch.nn.ReLU(), torch.nn.Dropout(0.1)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(400, 1))

def loss(model, batch):
    return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])

wide = [TrainingCase(name="wide", model=model, batch=batch, loss=loss)]
"""


@pytest.fixture
def run_child(pytester: pytest.Pytester) -> Run:
    """A session with the plugin; it takes half a minute on two cores that nobody else uses."""
    plugins = [part for name in ("xdist", "timeout", "pytest_gputrain") for part in ("-p", name)]
    return lambda *arguments: pytester.runpytest_subprocess(*plugins, MODULE, "-n0", *arguments, timeout=800)


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_pass_and_leave_a_comparison(run_child: Run, tmp_path: Path) -> None:
    result = run_child("-rs", "--gputrain-report", str(tmp_path))
    result.assert_outcomes(passed=SHIPPED, skipped=SHIPPED)
    kept = json.loads((tmp_path / throughput.FILE).read_text())
    assert kept["device"] == "cpu"
    assert kept["measured_on"]["torch"]
    assert {"start_seconds", "discovery_seconds", "training_seconds"} <= kept["auto"].keys()


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_is_able_to_fail(run_child: Run) -> None:
    result = run_child("-p", "tests.planted.plug_broken_train", "-k", "cpu")
    planted = [(test, name) for test, names in PLANTED.items() for name in names]
    result.assert_outcomes(failed=len(planted), deselected=len(planted))
    for test, name in planted:
        result.stdout.fnmatch_lines_random(f"FAILED *{test}?train-cpu-{name}?*")


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_users_case_that_a_list_holds(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(my_cases=CASES)
    result = run_child("-v", "--gputrain-case", "my_cases:wide", "-k", "wide-cpu")
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] >= 10
    assert "failed" not in outcomes
    result.stdout.fnmatch_lines_random("*test_two_ranks?wide-cpu? PASSED*")


def run_of(device: str, size: int, speed: float, discovery: float) -> dict[str, object]:
    figures = dict.fromkeys(throughput.FIGURES, 1.0)
    of_run = {"case": "train", "device": device, "world_size": 1, "steps": 3, "total_batch_size": 20}
    varied = {"device_batch_size": size, "tokens_per_second": speed, "discovery_seconds": discovery}
    return {**figures, **of_run, **varied}


def test_a_comparison_tells_when_the_search_has_paid_for_itself() -> None:
    pairs = [
        (run_of("cpu", 2, speed, 0.0), run_of("cpu", 10, speed * 3, 8.0)) for speed in (10.0, 20.0, 90.0)
    ]
    figures = throughput.compare(pairs)
    assert figures["auto_over_manual"] == 3.0
    assert figures["manual"]["tokens_per_second"] == 20.0
    assert figures["auto"]["device_batch_size"] == 10
    assert figures["paid_back_after_seconds"] == 4.0
    slower = [(manual, {**auto, "tokens_per_second": 1.0}) for manual, auto in pairs]
    assert throughput.compare(slower)["paid_back_after_seconds"] is None


def test_a_comparison_on_a_cpu_does_not_replace_that_of_a_gpu(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    names = [
        throughput.write({"device": device}, folder, device).name for device in ("cpu", "cpu", "cuda", "cpu")
    ]
    assert names == [throughput.FILE] * 3 + ["throughput_comparison-cpu.json"]
    assert json.loads((folder / throughput.FILE).read_text()) == {"device": "cuda"}
    assert len([*folder.iterdir()]) == 2
