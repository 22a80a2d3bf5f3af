"""Whether a loss falls, from the same batches before and after."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_gputrain.endurance.falling import Evidence, judge_falling

BEFORE = [5.5, 5.6, 5.4, 5.5]


def finding(after: list[float], *, moved: bool = True, steps: int = 300, rate: float = 1e-3) -> str:
    return judged(Evidence(before=BEFORE, after=after, steps=steps, moved=moved, rate=rate))


def judged(evidence: Evidence) -> str:
    found, note = judge_falling(evidence)
    return found.message if found else note


@pytest.mark.parametrize("by", [1.0, 1e-3, 1e-4])
def test_a_loss_that_falls_is_well_however_little(by: float) -> None:
    assert finding([loss - by for loss in BEFORE]) == ""


def test_one_that_rises_or_stays_is_not() -> None:
    assert finding([loss + 0.5 for loss in BEFORE]).startswith(
        "the loss rises: 5.5 before training and 6 after"
    )
    assert finding(BEFORE).startswith("the loss does not fall: 5.5 before training and 5.5 after 300 steps")
    assert "no parameter moved in 300 steps" in finding(BEFORE, moved=False)


def test_what_cannot_be_said_is_a_note() -> None:
    assert "cannot show whether the loss falls" in finding(BEFORE, steps=5)
    assert "too low to say" in finding(BEFORE, rate=1e-8)
    assert judged(Evidence(before=[], after=[], steps=300, moved=True)) == ""
    assert judged(Evidence(before=[math.nan], after=[1.0], steps=300, moved=True)) == ""


def test_another_objective_may_be_what_falls() -> None:
    rising = Evidence(before=BEFORE, after=[6.0] * 4, steps=300, moved=True)
    assert judged(replace(rising, own=([1.0], [0.5]))).endswith("; what step returns does (1 to 0.5)")
    assert judged(replace(rising, own=([1.0], [0.99]))).startswith("the loss rises")
    assert judged(replace(rising, takes_turns=True)).endswith("and one of them may climb")
