"""The same guard on a GPU, where torch's allocator refuses."""

from __future__ import annotations

import pytest
import torch

from pytest_gputrain import OutOfMemory
from pytest_gputrain.memory.guard import OomGuard

MIB = 2**20

pytestmark = pytest.mark.requires_gpus(1, memory="4GB")


def fraction() -> float:
    ask = getattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda: 1.0)
    return float(ask())


def test_a_limit_is_held_and_the_fraction_restored() -> None:
    before = fraction()
    with pytest.raises(OutOfMemory) as caught, OomGuard("64MiB", "cuda") as guard:
        kept = [torch.empty(16 * MIB, dtype=torch.uint8, device="cuda") for _ in range(8)]
        kept.clear()
    assert caught.value.requested == 16 * MIB
    assert guard.peak_bytes <= 64 * MIB
    assert guard.left == ()
    assert fraction() == before


def test_the_peak_is_the_allocators_and_nested_guards_keep_theirs() -> None:
    with OomGuard(device="cuda") as outer:
        torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
        with OomGuard(device="cuda") as inner:
            torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    assert outer.peak_bytes - inner.peak_bytes == 16 * MIB


def test_categories_and_leaks() -> None:
    net = torch.nn.Linear(1024, 1024, device="cuda")
    with OomGuard(device="cuda", roots=[net]) as guard:
        history = [net(torch.randn(1024, 1024, device="cuda")) for _ in range(3)]
    assert guard.by_category["parameters"] == sum(p.nbytes for p in net.parameters())
    assert "`history`" in guard.leaks[0].held_by
    assert len(history) == 3


def test_a_limit_above_the_device_cannot_be_held() -> None:
    with pytest.raises(ValueError, match=r"^a limit of .* cannot be held on cuda:0, which has .*; leave "):
        OomGuard("100TB", "cuda:0").__enter__()
