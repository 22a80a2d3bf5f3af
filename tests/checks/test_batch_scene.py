"""The budget that a batch-size finder is asked with, chosen from what sizes take."""

from __future__ import annotations

import pytest

from pytest_gputrain.checks.batch_runs import Ran
from pytest_gputrain.checks.batch_scene import Ladder, choose
from pytest_gputrain.checks.result import CheckSkipped


def test_a_case_that_raises_above_the_smallest_size_is_told() -> None:
    def measure(size: int) -> Ran:
        raise ValueError("legal is a scalar tensor")

    with pytest.raises(CheckSkipped) as raised:
        choose(Ladder(measure, grain=1), minimum=1)
    told = (
        "the case works at batch size 1 and raises at 2, so there is nothing to find: ValueError: legal is a"
    )
    assert str(raised.value).startswith(told)
