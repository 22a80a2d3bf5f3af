"""What a type checker sees of the public surface. mypy reads this file; running it proves little."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gputrain import (
    AccumulationPlan,
    Cause,
    CheckResult,
    LaunchError,
    LaunchResult,
    TrainingCase,
    Verdict,
    launch,
    parametrize_with_checks,
    plan_accumulation,
    requires_gpus,
    run_checks,
    stability,
)

if TYPE_CHECKING:
    from pytest_gputrain.launch import Launcher

MARKERS: list[pytest.MarkDecorator] = [requires_gpus(2), requires_gpus(1, memory="80GB"), stability(depth=4)]


def results_of(launcher: Launcher) -> tuple[Verdict, Cause | None, Path]:
    result: LaunchResult = launcher(print, 1, world_size=2, timeout=5.0, check=False)
    script: LaunchResult = launch.torchrun("train.py", "--steps", 3, nproc=2)
    try:
        launch(print, world_size=2)
    except LaunchError as error:
        result = error.result
    return result.verdict, script.cause, result.artifacts


def checked(case: TrainingCase) -> list[CheckResult]:
    return run_checks(case, checks=["ddp_parity"], device="cpu", world_size=2)


def planned() -> tuple[int, ...]:
    plan: AccumulationPlan = plan_accumulation(100, 16, world_size=2, exact=False)
    return plan.micro_batches()


def test_names_are_what_they_are_called() -> None:
    assert callable(launch)
    assert callable(parametrize_with_checks)
    assert planned() == (10,) * 5
    assert [mark.name for mark in MARKERS] == ["requires_gpus", "requires_gpus", "stability"]
