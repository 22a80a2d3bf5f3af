"""What compile_parity and compile_speed say beyond the planted programs, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.checks.compile_eager import TRIES, settled
from pytest_gputrain.checks.compile_sides import Probe, Snapshot
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed
from tests.planted.broken_compile_parity import (
    evaluation_differs_when_compiled,
    global_schedule_frozen_in_the_graph,
)
from tests.planted.plant import Net, case


def verdict(program: Any, check: str = "compile_parity", **options: Any) -> CheckResult:
    return run_checks(program, checks=[check], **options)[0]


class CountingNet(Net):
    """Counts its steps in a buffer, which sets the temperature. Some torch (2.13) compiles its backward
    wrongly.
    """

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) / (1 + 0.01 * self.count)


def head_gradient(backend: str | None) -> Tensor:
    torch.manual_seed(0)
    model, x = Net.__new__(CountingNet), torch.ones(2, 16)
    CountingNet.__init__(model)
    run: Any = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
    run(x).square().mean().backward()
    assert model.head.weight.grad is not None
    return model.head.weight.grad


class Scaled:
    """A side whose first gradients from the first point overflow so often."""

    def __init__(self, overflows: int) -> None:
        self.bare, self.left = Net(), overflows

    def probe(self, batch: Any, seed: int) -> Probe:
        self.left -= 1
        return Probe(1.0, {"head.weight": torch.tensor(float("inf") if self.left >= 0 else 1.0)}, {})


@pytest.mark.parametrize(("overflows", "tries"), [(0, [1, 1]), (3, [4, 1]), (99, [TRIES, TRIES])])
def test_a_step_is_taken_again_while_its_loss_scale_is_too_high(overflows: int, tries: list[int]) -> None:
    side: Any = Scaled(overflows)
    found, needed = settled(side, [Snapshot.of(side.bare)] * 2, {}, CheckContext())
    assert needed == tries
    assert [bool(torch.isfinite(one.given[0])) for one in found] == [overflows < TRIES] * 2


@pytest.mark.nightly
def test_a_gradient_that_torch_itself_gets_wrong_is_found() -> None:
    torch._dynamo.reset()
    right, compiled = head_gradient(None), head_gradient("aot_eager")
    torch._dynamo.reset()
    result = verdict(case("counting", model=CountingNet))
    assert result.outcome == ("passed" if torch.allclose(right, compiled, rtol=1e-4) else "failed"), str(
        result
    )


def test_evaluation_is_compared_by_what_the_model_gives() -> None:
    from pytest_gputrain.checks.compile_chance import compare_evaluation
    from pytest_gputrain.checks.compile_sides import Snapshot, compiled, eager

    program = dataclasses.replace(
        evaluation_differs_when_compiled(), compile=lambda model: torch.compile(model, backend="eager")
    )
    batch, ctx = program.batch(4, torch.device("cpu")), CheckContext()
    mine = eager(program, ctx)
    theirs = compiled(program, ctx, Snapshot.of(mine.bare))
    with pytest.raises(CheckFailed, match="something else in evaluation mode, where dropout rests"):
        compare_evaluation([mine], theirs, batch, 1, "float32")
    assert compare_evaluation([mine], eager(program, ctx), batch, 1, "float32") is None
    assert all(module.training for side in (mine, theirs) for module in side.bare.modules())
    torch._dynamo.reset()


def test_what_cannot_be_compared_is_said_and_is_no_verdict() -> None:
    result = verdict(case("nothing returned", compile=lambda model: None))
    assert result.outcome == "failed"
    assert result.message.startswith("compile() returned None; it has to return what the loop calls")
    nan = case("nan", loss=lambda model, batch: model(batch["x"]).sum() * float("nan"))
    result = verdict(nan)
    assert (result.outcome, result.message) == (
        "error",
        "the eager step gives gradients that are NaN or infinite; there is nothing to compare with",
    )


def test_the_speed_of_a_cpu_is_not_judged() -> None:
    result = verdict(case("tiny"), "compile_speed")
    assert result.outcome == "skipped"
    assert result.message == (
        "compiled and eager are timed on a GPU only (--device cuda): on a CPU their ratio says nothing of "
        "one; what "
        "a loop measures itself with is judged on a CPU as well, run_checks(case, meter=...)"
    )


def says(text: Any) -> Any:
    return lambda train_step, batches: text


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        (
            says({}),
            "a meter said seconds_per_step None, tokens_per_second None; it has to give at least one, above "
            "0",
        ),
        (says({"seconds_per_step": 1.0}), "the meter ran 0 steps; more than 5 are needed"),
    ],
)
def test_a_meter_that_says_nothing_fails_with_its_words(meter: Any, message: str) -> None:
    result = verdict(case("tiny"), "compile_speed", meter=meter)
    assert result.outcome == "failed"
    assert message in result.message


def test_the_report_is_written_for_a_failure_too(tmp_path: Path) -> None:
    program = dataclasses.replace(global_schedule_frozen_in_the_graph(), name="my case/1")
    result = verdict(program, compile_report=tmp_path / "report")
    assert result.outcome == "failed"
    document = json.loads((tmp_path / "report" / "my_case_1-cpu-parity.json").read_text())
    assert len(document["eager"]) == len(document["compiled"]) == 100
    assert document["backend"] == "aot_eager"
    page = (tmp_path / "report" / "compile.md").read_text()
    assert "| graphs |  | 1 |" in page
