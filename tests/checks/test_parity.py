"""By which of its ways ``ddp_parity`` came to pass a program: a wrong way would hide that another is lost."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.checks.parity import StepFacts
from pytest_gputrain.checks.parity_reasons import Reasons
from pytest_gputrain.trace.steps import AFTER_BACKWARD, StepRecord
from tests.planted import healthy_loops, healthy_models, healthy_parallel


def parity(case: TrainingCase) -> CheckResult:
    (result,) = run_checks(case, checks=["ddp_parity"])
    assert result.outcome == "passed", str(result)
    return result


@pytest.mark.parametrize(
    "case",
    [
        healthy_models.plain,
        healthy_loops.adversarial,
        healthy_parallel.manual_all_reduce,
        healthy_loops.loss_scaler,
    ],
    ids=lambda case: case.__name__,
)
def test_average_of_replays_is_matched_without_remarks(case: object) -> None:
    assert callable(case)
    result = parity(case())
    assert result.message == ""
    assert result.figures["worst"] < 1e-5
    assert (result.figures["ranks"], result.figures["steps"]) == (2, 5)


@pytest.mark.parametrize(
    ("case", "remark"),
    [
        (healthy_parallel.contrastive_across_ranks(), "agrees with the joined batch in one process"),
        (healthy_parallel.optimizer_that_averages(), "14 parameters are averaged inside the optimizer"),
        (healthy_parallel.float16_compression(), "agree to the precision of bfloat16 compression only"),
        (healthy_parallel.summed_loss(), "gradients are the sum over 2 ranks"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_ways_are_remarked(case: TrainingCase, remark: str) -> None:
    assert remark in parity(case).message


class TwoRanks:
    """What the other rank says, told beforehand."""

    world_size = 2

    def __init__(self, flags: list[list[int]]) -> None:
        self.flagged = lambda own: flags


@pytest.mark.parametrize(
    ("skips", "changed", "said"),
    [
        ([1], set(), "rank 1 leaves the optimizer's step out where the others take it"),
        ([0, 1], {"w"}, "the gradients agree at first, and no more when the optimizer steps"),
        ([], set(), "the gradients agree, so the update itself differs"),
    ],
)
def test_why_updates_differ_where_gradients_agreed(skips: list[int], changed: set[str], said: str) -> None:
    peers: Any = TwoRanks([skips])
    reasons = Reasons(peers, None, None, {"w": None}, set(), changed)
    steps = [StepFacts(b"", 1, synced={"w": AFTER_BACKWARD})]
    assert reasons.why({"w": [1]}, StepRecord(), steps, None).startswith(said)
