"""The tensor-parallel checks as a user meets them: skips, refusals, simulated ranks, the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.checks.tp_report import write_reports
from pytest_gputrain.reference import opt
from tests.planted.healthy_tensor_parallel import megatron
from tests.planted.plant import case

CHECKS = ("tp_forward", "tp_backward", "tp_optimizers", "tp_memory", "tp_training")


def test_without_a_plan_they_are_skipped() -> None:
    results = run_checks(case("tiny"), checks=CHECKS)
    assert {(one.outcome, one.message) for one in results} == {
        (
            "skipped",
            "no tensor-parallel plan given: TrainingCase(parallelize=...), see docs/tensor-parallel.md",
        )
    }


def test_a_plan_that_names_no_module_is_refused_before_any_check() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel

    wrong = dataclasses.replace(opt.case, parallelize={"model.decoder.layers.*.fc3": ColwiseParallel()})
    seen: list[CheckResult] = []
    with pytest.raises(ValueError, match=r"^case 'opt': the plan names .* and the model has no such module"):
        run_checks(wrong, checks=["tp_forward"], on_result=seen.append)
    assert not seen


def test_a_world_size_that_does_not_divide_is_told_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"has 4 heads, not divisible by 3 ranks \(4 = 1 x 3 \+ 1\)"):
        run_checks(opt.case, checks=["tp_forward"], world_size=3)


def test_simulated_ranks_say_so() -> None:
    forward, training = run_checks(
        opt.case, checks=["tp_forward", "tp_training"], simulated=True, world_size=4
    )
    assert forward.outcome == "passed", str(forward)
    assert forward.figures["simulated ranks"] == 4
    assert "ranks" not in forward.figures
    assert training.outcome == "skipped"


def test_code_that_asks_for_its_rank_is_not_simulated() -> None:
    (result,) = run_checks(megatron(), checks=["tp_forward"], simulated=True)
    assert result.outcome == "skipped"
    assert "use real ranks" in result.message


def test_report_of_real_results(tmp_path: Path) -> None:
    results = run_checks(opt.case, checks=["tp_backward", "tp_memory"])
    (path,) = write_reports(results, tmp_path, device="cpu", world_size=2)
    assert path.name == "opt_test_report.txt"
    text = path.read_text()
    assert "Passed:       2" in text
    assert "model.decoder.layers.1.fc2" in text
    assert "overhead (sum - whole) / whole = 9.3%" in text


def test_a_name_with_signs_and_simulated_ranks(tmp_path: Path) -> None:
    result = CheckResult("tp_forward", "opt-125m", "passed", seconds=1.0)
    (path,) = write_reports([result], tmp_path, device="cpu", world_size=8, simulated=True)
    assert path.name == "opt125m_test_report.txt"
    assert path.read_text().startswith("Tensor parallel: opt-125m, 8 simulated ranks\n")
