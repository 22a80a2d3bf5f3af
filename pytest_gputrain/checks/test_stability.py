"""Training over many steps: ``pytest --pyargs pytest_gputrain.checks -k stable --gputrain-case MODULE:ATTR``.

Each case trains up to 300 steps on two ranks. With ``--stability`` come GPTs of depth 12 to 32 at the batch
size found: 1,000 steps at full width on GPUs; narrow ones, with few steps and a small budget, on a CPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.checks.context import DEVICES, CheckContext
from pytest_gputrain.checks.parametrize import BoundCheck
from pytest_gputrain.checks.registry import get_check
from pytest_gputrain.devices import discover, visible_gpus
from pytest_gputrain.endurance.plan import StabilityOptions
from pytest_gputrain.plugin.markers import stability_plan
from pytest_gputrain.plugin.shipped import parametrize
from pytest_gputrain.reference.gpt import gpt_case

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.plugin.launcher import PytestLauncher

DEPTHS = (12, 20, 26, 32)
SHAPES: dict[str, dict[str, Any]] = {"cpu": {"width": 32}, "cuda": {"sequence_length": 2048}}
SAMPLES = 12  # what the budget of a CPU holds
STEPS_ON_CPU = 20  # a CPU runs a twentieth of the steps that the marker asks for
MARGIN = 0.85
RANKS = 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        parametrize(metafunc, num_gpus=RANKS)


def test_stable_training(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


@pytest.mark.parametrize(
    "device",
    [pytest.param(one, marks=pytest.mark.requires_gpus(1) if one == "cuda" else ()) for one in DEVICES],
)
@pytest.mark.parametrize(
    "depth", [pytest.param(depth, marks=pytest.mark.stability(depth=depth)) for depth in DEPTHS]
)
def test_stable_at_depth(
    depth: int, device: str, ddp_launcher: PytestLauncher, request: pytest.FixtureRequest
) -> None:
    """Many steps at the size found, within the memory that it was found for."""
    plan = stability_plan(next(request.node.iter_markers("stability")))
    case = gpt_case(plan.depth, **SHAPES[device])
    # On one GPU the second rank would only wait for the first.
    ranks = RANKS if device == "cpu" else min(RANKS, len(visible_gpus(discover(), os.environ)))
    size, capacity = ddp_launcher(found, case, device, ranks, world_size=1, device=device).values[0]
    iterations = plan.iterations if device == "cuda" else max(1, plan.iterations // STEPS_ON_CPU)
    options = StabilityOptions(ranks=ranks, capacity=capacity if device == "cpu" else None)
    ctx = CheckContext(
        device=device, batch_size=size, iterations=iterations, launcher=ddp_launcher, stability=options
    )
    BoundCheck.told(get_check("stable_training").function(case, ctx))


def found(case: TrainingCase, device: str, ranks: int) -> tuple[int, int]:
    """In a rank: (samples a rank, bytes): what fits the GPU, or a CPU's small budget."""
    from pytest_gputrain.batch.discovery import find_batch

    how: dict[str, Any] = {"device": device, "multiple_of": 2, "world_size": ranks, "safety_margin": MARGIN}
    if device == "cpu":
        law = find_batch(case, max_batch_size=4, **how).law
        assert law is not None, "sizes 2 and 4 are probed"
        fixed, each = law
        # A CPU measures slowly: the law says where to look, so that two sizes are tried and not eight.
        how |= {"predicted": lambda size: fixed + each * size, "max_batch_size": SAMPLES + 4, "iterations": 2}
        how["capacity"] = int((fixed + each * (SAMPLES + 0.5)) / MARGIN)
    answer = find_batch(case, **how)
    if not answer.size:
        raise RuntimeError(answer.too_large(case.name))
    return answer.size, answer.capacity
