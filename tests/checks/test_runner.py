"""``run_checks``: order, outcomes, strict expectations, and bad input in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pytest_gputrain.case import CaseError, TrainingCase
from pytest_gputrain.checks import CheckContext, CheckResult, all_check_ids, get_check, registry, run_checks
from pytest_gputrain.checks.runner import with_expectation
from pytest_gputrain.endurance.expected import EXPECTABLE
from tests.planted.broken_gradients import unused_parameter
from tests.planted.plant import case, draw

IDS = [
    "gradients_arrive",
    "checkpointing_parity",
    "optimizer_covers",
    "ddp_completes",
    "ddp_parity",
    "ddp_data_differs",
    "accumulation_parity",
    "accumulation_schedule",
    "batch_size_found",
    "batch_size_holds",
    "compile_no_recompiles",
    "compile_parity",
    "compile_checkpoint_keys",
    "batch_shapes_constant",
    "compile_speed",
    "tp_forward",
    "tp_backward",
    "tp_optimizers",
    "tp_memory",
    "tp_training",
    "stable_training",
]


def test_ids_are_the_designs() -> None:
    assert all_check_ids() == IDS
    assert {get_check(check_id).subject for check_id in IDS} == {
        "gradient flow",
        "data parallel",
        "accumulation",
        "batch size",
        "compile",
        "tensor parallel",
        "stability",
    }


def test_results_come_in_the_order_asked_for_and_as_they_are_made() -> None:
    seen: list[CheckResult] = []
    results = run_checks(
        case("tiny"), checks=["checkpointing_parity", "gradients_arrive"], on_result=seen.append
    )
    assert seen == results
    assert [(result.check, result.outcome) for result in results] == [
        ("checkpointing_parity", "skipped"),
        ("gradients_arrive", "passed"),
    ]
    assert results[0].message == "no set_checkpointing given"
    assert results[1].figures["parameters"] == 14
    assert results[1].seconds > 0


def test_failure_reads_as_one_line_with_its_check_and_case() -> None:
    (result,) = run_checks(unused_parameter(), checks=["gradients_arrive"])
    assert str(result).splitlines()[0] == (
        "gradients_arrive[unused_parameter] FAILED: 2 of 16 trainable parameters got no gradient "
        "in 24 steps: unused.weight (in unused, Linear), unused.bias (in unused, Linear)"
    )


def test_expected_failure_is_skipped_with_its_reason_and_strict() -> None:
    fails = dataclasses.replace(unused_parameter(), expected_failures={"gradients_arrive": "spare layer"})
    (result,) = run_checks(fails, checks=["gradients_arrive"])
    assert result.outcome == "skipped"
    assert result.message.startswith("expected failure (spare layer): 2 of 16 trainable parameters")
    (result,) = run_checks(
        case("tiny", expected_failures={"gradients_arrive": "?"}), checks=["gradients_arrive"]
    )
    assert result.outcome == "failed"
    assert result.message == (
        "expected to fail (?), but it passed: remove gradients_arrive from expected_failures"
    )


@pytest.mark.parametrize(
    ("outcome", "verdict", "skips"),
    [("failed", "HUNG", True), ("failed", "FAILED", False), ("skipped", "HUNG", False)],
)
def test_a_hang_is_paid_for_once(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, verdict: str, skips: bool
) -> None:
    for check_id in ("ddp_completes", "ddp_parity", "ddp_data_differs"):
        check = get_check(check_id)
        first = check_id == "ddp_completes"
        result = CheckResult(check_id, "tiny", outcome if first else "passed", "why\n", {"verdict": verdict})
        function = lambda case, ctx, result=result: result  # noqa: E731 - bound now
        monkeypatch.setitem(registry._CHECKS, check_id, dataclasses.replace(check, function=function))
    results = run_checks(case("tiny"), checks=["ddp_completes", "ddp_parity", "ddp_data_differs"])
    expected = ("skipped", "ddp_completes hung: why") if skips else ("passed", "why\n")
    assert [(result.outcome, result.message) for result in results[1:]] == [expected] * 2


@pytest.mark.parametrize("outcome", ["skipped", "error"])
def test_only_failures_are_expected(outcome: Any) -> None:
    result = CheckResult("ddp_parity", "tiny", outcome, "why")
    assert with_expectation(result, "reason") is result


def test_defect_of_a_check_is_an_error_never_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(case: TrainingCase, ctx: CheckContext) -> dict[str, Any]:
        raise KeyError("oops")

    check = get_check("gradients_arrive")
    broken = registry.as_check("gradients_arrive", defective)
    monkeypatch.setitem(registry._CHECKS, check.id, dataclasses.replace(check, function=broken))
    (result,) = run_checks(case("tiny"), checks=["gradients_arrive"])
    assert result.outcome == "error"
    assert result.message.startswith("the check itself failed: KeyError: 'oops' (at ")


def bad_batch(batch_size: int, device: Any) -> Any:
    raise KeyError("labels")


def bad_model() -> Any:
    raise RuntimeError("no weights\nhere")


def not_a_module() -> Any:
    return {"weights": torch.ones(2)}


@pytest.mark.parametrize(
    ("fields", "start", "end"),
    [
        (
            {"batch": bad_batch},
            "case 'tiny': batch() raised KeyError: 'labels' (at ",
            "; batch(batch_size, device) has to return one batch of that many samples on that device",
        ),
        (
            {"model": bad_model},
            "case 'tiny': model() raised RuntimeError: no weights here (at ",
            "; model() has to build and return a torch.nn.Module without arguments",
        ),
        (
            {"model": not_a_module},
            "case 'tiny': model() returned a dict; ",
            "model() has to build and return a torch.nn.Module without arguments",
        ),
        (
            {"batch": lambda batch_size, device: "text"},
            "case 'tiny': batch() returned no tensor, but 'text'; ",
            "has to return one batch of that many samples on that device",
        ),
        ({"model": "nowhere:model"}, "case 'tiny': tiny.model: no module named 'nowhere'", "is installed"),
        (
            {"parallelize": "nowhere:cut"},
            "case 'tiny': tiny.parallelize: no module named 'nowhere'",
            "is installed",
        ),
        (
            {"expected_failures": {"ddp_parities": "typo"}},
            "case 'tiny': expected_failures names ddp_parities, which is no check; give some of ",
            ", ".join([*IDS, *EXPECTABLE]),
        ),
    ],
)
def test_unusable_case_is_one_line_before_any_check(fields: Any, start: str, end: str) -> None:
    ran: list[CheckResult] = []
    with pytest.raises(CaseError) as raised:
        run_checks(case("tiny", **fields), on_result=ran.append)
    line = str(raised.value)
    assert line.startswith(start)
    assert line.endswith(end)
    assert "\n" not in line
    assert not ran
    if "(at " in line:
        assert "test_runner.py:" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"checks": ["ddp"]}, f"no check is called 'ddp'; give some of {', '.join(IDS)}"),
        ({"checks": "ddp_parity"}, "checks is the string 'ddp_parity'; give a list of ids, ['ddp_parity']"),
        ({"device": "tpu"}, "device is 'tpu'; give one of cpu, cuda"),
        ({"world_size": 1}, "world_size is 1; data-parallel checks need 2 or more"),
        (
            {"compile_backend": ""},
            "compile_backend is ''; give a backend's name as torch.compile takes it (aot_eager, eager, "
            "inductor), or None for the default",
        ),
        ({"timeout": -1}, "timeout is -1; give seconds above 0, or None for the default"),
    ],
)
def test_bad_argument_is_one_line(arguments: Any, line: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the literal text follows
        run_checks(case("tiny", batch=draw), **arguments)
    assert str(raised.value) == line


def test_something_that_is_no_case_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^case is a str; give a TrainingCase, or load_case"):
        run_checks("module:attribute")  # type: ignore[arg-type]


def test_figures_of_shared_gpus_carry_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ranks, on the CPU, placed as on a machine with one GPU."""
    from pytest_gputrain.launch import request

    label = "2 ranks shared 1 GPU (NVIDIA H200) through gloo: not a multi-GPU result"
    shared = request.Placement("cpu", "gloo", label)
    monkeypatch.setattr(request, "placement", lambda *_, **__: shared)
    (result,) = run_checks(case("small"), checks=["ddp_completes"])
    assert (result.outcome, result.figures["shared_gpu"]) == ("passed", label)
    failing = case("wrong", loss=lambda model, batch: 1 / 0)
    (result,) = run_checks(failing, checks=["ddp_completes"])
    assert (result.outcome, result.figures["shared_gpu"]) == ("failed", label)
    monkeypatch.undo()
    (result,) = run_checks(case("small"), checks=["ddp_completes"])
    assert "shared_gpu" not in result.figures
