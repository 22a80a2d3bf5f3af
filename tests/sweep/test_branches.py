"""Planned branches: every one sees the same tokens, exactly, whatever the numbers."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.batch.accumulation import plan_accumulation
from pytest_gputrain.sweep import BranchPlan, plan_branches

LEGAL = {
    "k_values": [1, 2, 4],
    "base_batch": 8,
    "base_lr": 3e-4,
    "block_size": 128,
    "tokens": 100_000,
    "max_device_batch": 32,
}


def planned(**changed: object) -> BranchPlan:
    return plan_branches(**{**LEGAL, **changed})  # type: ignore[arg-type]


@given(
    k_values=st.lists(st.integers(1, 64), min_size=1, max_size=8, unique=True),
    share=st.integers(1, 40),
    world_size=st.integers(1, 8),
    block_size=st.integers(1, 2048),
    spare=st.integers(0, 5_000_000),
    limit=st.integers(1, 512),
)
def test_every_branch_sees_exactly_the_same_tokens(
    k_values: list[int], share: int, world_size: int, block_size: int, spare: int, limit: int
) -> None:
    base_batch = share * world_size
    asked = max(k_values) * base_batch * block_size + spare
    plan = plan_branches(
        k_values=k_values,
        base_batch=base_batch,
        base_lr=1e-3,
        block_size=block_size,
        tokens=asked,
        max_device_batch=limit,
        world_size=world_size,
    )
    # Never more than asked for, and less by no sequence that all ranks could have had.
    assert 0 <= asked - plan.tokens < block_size * world_size
    assert plan.tokens == plan.sequences * block_size
    assert [branch.k for branch in plan] == k_values
    for branch in plan:
        # Counted as a training loop would: step by step, rank by rank, micro-batch by micro-batch.
        steps = [branch.plan] * (branch.num_steps - 1) + [branch.last_plan]
        samples = {step: sum(step.micro_batches()) * step.world_size for step in set(steps)}
        assert sum(samples[step] for step in steps) * block_size == branch.tokens == plan.tokens
        assert branch.global_batch_size == branch.k * base_batch
        assert branch.plan.device_batch_size <= limit
        assert 1 <= branch.last_step_sequences <= branch.global_batch_size
        assert branch.last_plan.is_exact
        assert branch.last_plan.device_batch_size <= branch.plan.device_batch_size


@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 8))
def test_who_knows_the_micro_batch_plans_the_same(share: int, limit: int, world_size: int) -> None:
    """So a script that takes total_batch_size and device_batch_size alone has the planned micro-batches."""
    plan = plan_accumulation(share * world_size, limit, world_size)
    assert plan_accumulation(plan.target, plan.device_batch_size, world_size) == plan


@pytest.mark.parametrize(("scaling", "by"), [("sqrt", math.sqrt), ("linear", float), ("none", lambda k: 1)])
def test_learning_rates(scaling: str, by: object) -> None:
    plan = planned(k_values=[1, 2, 3, 16], lr_scaling=scaling)
    assert [branch.learning_rate for branch in plan] == [by(k) * 3e-4 for k in (1, 2, 3, 16)]  # type: ignore[operator]
    assert plan.branches[0].learning_rate == 3e-4


def test_the_sweep_of_the_documentation() -> None:
    plan = planned(k_values=[1, 2, 4, 8, 16, 32])
    assert (plan.sequences, plan.tokens) == (781, 99_968)
    assert [(branch.num_steps, branch.last_step_sequences) for branch in plan] == [
        (98, 5),
        (49, 13),
        (25, 13),
        (13, 13),
        (7, 13),
        (4, 13),
    ]
    assert str(plan.branches[-1].plan) == "Micro-batch: 32, Grad accum: 8, Effective: 256"
    assert len({branch.wandb_run_name for branch in plan}) == 6
    assert plan.branches[2].wandb_run_name == "branches-k4-bs32-lr0.0006"


def test_a_whole_last_step_is_as_the_others() -> None:
    for branch in planned(tokens=4 * 8 * 128 * 10):
        assert branch.last_plan == branch.plan


@pytest.mark.parametrize("value", [0, -8, 2.5, "16", None, True])
@pytest.mark.parametrize(
    "name", ["base_batch", "block_size", "tokens", "max_device_batch", "world_size", "k"]
)
def test_counts_are_whole_numbers(name: str, value: object) -> None:
    changed = {"k_values": [1, value]} if name == "k" else {name: value}
    message = f"{name} is {value!r}; legal is a whole number of 1 or more"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planned(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_values": []}, "no k is given; give one or more, such as 1 2 4"),
        ({"k_values": [2, 4, 2]}, "k 2 is given twice; give each k once"),
        ({"base_lr": math.inf}, "base_lr is inf; legal is a finite number above 0"),
        ({"base_lr": math.nan}, "base_lr is nan; legal is a finite number above 0"),
        ({"base_lr": 0}, "base_lr is 0; legal is a finite number above 0"),
        ({"base_lr": "3e-4"}, "base_lr is '3e-4'; legal is a finite number above 0"),
        (
            {"base_lr": 1.7e308, "k_values": [4], "tokens": 10**6},
            "base_lr 1.7e+308 by sqrt of k 4 is no finite number; give a smaller one",
        ),
        ({"lr_scaling": "cube"}, "lr_scaling is 'cube'; legal are sqrt, linear, none"),
        (
            {"base_name": "../etc"},
            "base_name is '../etc'; legal are up to 64 letters, digits, '.', '_' and '-', with a letter or "
            "digit first",
        ),
        (
            {"tokens": 4000},
            "4000 tokens are 31 sequences of 128, fewer than the 32 (4 x 8) of one step of k 4; "
            "give 4096 tokens or more, or a smaller batch",
        ),
        (
            {"world_size": 3},
            "k 1 makes a batch of 1 x 8 = 8, which 3 ranks cannot share equally; take a base batch of 6 or 9",
        ),
        (
            {"world_size": 16},
            "k 1 makes a batch of 1 x 8 = 8, which 16 ranks cannot share equally; take a base batch of 16",
        ),
    ],
)
def test_what_cannot_be_planned(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planned(**changed)


def test_as_few_tokens_as_one_step() -> None:
    plan = planned(tokens=4096)
    assert [branch.num_steps for branch in plan] == [4, 2, 1]


def test_a_rate_that_is_no_float() -> None:
    with pytest.raises(ValueError, match=r"is no finite number; give a smaller one$"):
        planned(base_lr=10**400)
