"""The accumulation plan, against brute force."""

from __future__ import annotations

import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain import AccumulationPlan, plan_accumulation


@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 8))
def test_exact_wherever_the_ranks_can_share_the_batch(target: int, limit: int, world_size: int) -> None:
    if target % world_size:
        with pytest.raises(ValueError, match="cannot be shared equally"):
            plan_accumulation(target, limit, world_size)
        return
    plan = plan_accumulation(target, limit, world_size)
    check(plan, limit)
    assert plan.global_batch_size == target
    assert plan == plan_accumulation(target, limit, world_size, exact=False)


@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 8))
def test_else_the_nearest(target: int, limit: int, world_size: int) -> None:
    plan = plan_accumulation(target, limit, world_size, exact=False)
    check(plan, limit)
    shared = range(world_size, target + world_size + 1, world_size)
    assert plan.global_batch_size == min(shared, key=lambda size: (abs(size - target), size))
    assert plan.is_exact == (target % world_size == 0)


def check(plan: AccumulationPlan, limit: int) -> None:
    """What holds for every plan: within the limit, nothing empty, no more steps than said."""
    sizes = plan.micro_batches()
    assert len(sizes) == plan.accumulation_steps
    assert sum(sizes) * plan.world_size == plan.global_batch_size
    assert max(sizes) == plan.device_batch_size <= limit
    assert sizes[-1] == min(sizes) == plan.last_micro_batch >= 1
    assert math.isclose(sum(plan.weights()), 1.0)
    fewest = math.ceil(plan.samples_per_rank / limit)
    equal = [
        steps for steps in range(fewest, plan.samples_per_rank + 1) if plan.samples_per_rank % steps == 0
    ]
    cheap = [steps for steps in equal if steps <= 1.5 * fewest]
    assert plan.accumulation_steps == (cheap[0] if cheap else fewest)
    assert plan.is_ragged == (not cheap)


def test_many_more_plans_than_a_sweep_has_in_a_second() -> None:
    started = time.process_time()
    for k in range(1, 4097):
        assert plan_accumulation(8 * k, 512, 8).global_batch_size == 8 * k
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("target", "limit", "world_size", "text"),
    [
        (64, 16, 1, "Micro-batch: 16, Grad accum: 4, Effective: 64"),
        (100, 16, 1, "Micro-batch: 10, Grad accum: 10, Effective: 100"),
        (250, 32, 1, "Micro-batch: 25, Grad accum: 10, Effective: 250"),
        (8, 32, 1, "Micro-batch: 8, Grad accum: 1, Effective: 8"),
        (97, 16, 1, "Micro-batch: 14, Grad accum: 7, Effective: 97, Last micro-batch: 13"),
        (128, 16, 2, "Micro-batch: 16, Grad accum: 4, Effective: 128, Ranks: 2"),
    ],
)
def test_a_plan_in_words(target: int, limit: int, world_size: int, text: str) -> None:
    assert str(plan_accumulation(target, limit, world_size)) == text


def test_a_batch_that_the_ranks_cannot_share() -> None:
    message = (
        "a global batch of 8 cannot be shared equally by 3 ranks (8 / 3 = 2.67 samples); "
        "take 6 or 9 (exact=False takes 9)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_accumulation(8, 4, 3)
    nearest = plan_accumulation(8, 4, 3, exact=False)
    assert str(nearest) == "Micro-batch: 3, Grad accum: 1, Effective: 9, Ranks: 3, Target: 8"
    with pytest.raises(ValueError, match=r"take 3 \(exact=False takes 3\)"):
        plan_accumulation(2, 4, 3)


@pytest.mark.parametrize("value", [0, -16, 2.5, "16", None, True])
@pytest.mark.parametrize("name", ["global_batch_size", "max_device_batch_size", "world_size"])
def test_bad_input(name: str, value: object) -> None:
    legal: dict[str, object] = {"global_batch_size": 64, "max_device_batch_size": 16, "world_size": 1}
    message = f"{name} is {value!r}; legal is a whole number of 1 or more"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_accumulation(**{**legal, name: value})  # type: ignore[arg-type]
