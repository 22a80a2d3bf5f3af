from __future__ import annotations

import gc

import pytest
import torch

from pytest_gputrain.endurance import heap
from pytest_gputrain.endurance.heap import HeapMeter, heap_bytes

KEPT, STEPS = 4096, 100


@pytest.fixture(autouse=True)
def told() -> None:
    if heap_bytes() is None:
        pytest.skip("this C library does not tell what malloc has given out")


def added(keep: bool) -> int:
    """What so many steps add that make a tensor of 4 KiB each, and keep it or not."""
    kept, x = [], torch.randn(64, 64)
    gc.collect()  # what tests before left, and what would else be freed in between
    before = heap_bytes()
    for _ in range(STEPS):
        made = (x @ x).sum() + torch.zeros(KEPT // 4)
        if keep:
            kept.append(made)
    after = heap_bytes()
    assert before is not None and after is not None
    return after - before


def test_tensors_that_are_kept_are_seen_to_the_byte() -> None:
    added(keep=False)  # what torch makes once
    grown = added(keep=True)
    assert STEPS * KEPT <= grown <= STEPS * (KEPT + 2048)


def test_tensors_that_are_dropped_add_nothing() -> None:
    added(keep=False)
    assert abs(added(keep=False)) < STEPS * 512


def test_a_block_with_a_mapping_of_its_own_counts() -> None:
    before = heap_bytes()
    kept = torch.empty(2**26, dtype=torch.uint8)
    after = heap_bytes()
    assert before is not None and after is not None and after - before >= kept.nbytes


@pytest.mark.parametrize(("seconds", "limit", "between"), [(1e6, 1000, 1), (1e-9, 1000, 4), (1e-9, 200, 1)])
def test_a_dear_answer_is_asked_for_more_seldom_but_often_enough(
    seconds: float, limit: int, between: int
) -> None:
    meter = HeapMeter(limit)
    asked = [step for step in range(1, 41) if meter.read(step, seconds) is not None]
    assert asked[-1] - asked[-2] == between
    assert meter.last


def test_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "heap_bytes", lambda: None)
    meter = HeapMeter(1000)
    assert meter.read(1, 1.0) is meter.last is None
