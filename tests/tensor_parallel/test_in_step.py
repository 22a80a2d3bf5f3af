"""Ranks that would leave each other waiting in a collective are found without waiting."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pytest_gputrain import launch
from pytest_gputrain.tensor_parallel.golden_in_step import in_step
from pytest_gputrain.tensor_parallel.golden_world import RealWorld


def gather(size: int) -> None:
    part = torch.ones(size)
    dist.all_gather([torch.empty_like(part) for _ in range(dist.get_world_size())], part)


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such length")
    gather(2)


def body() -> list[bool]:
    world = RealWorld()
    calls: list[Any] = [
        lambda: gather(2),
        lambda: gather(2 + dist.get_rank()),
        raise_on_rank_1,
        lambda: gather(2) if dist.get_rank() else None,
        lambda: gather(3),
    ]
    return [in_step(world, call) for call in calls]


def test_ranks_out_of_step_are_found_and_can_go_on() -> None:
    equal, other_size, one_raises, one_is_done, again = range(5)
    for found in launch(body, world_size=2, timeout=60).values:
        assert [found[equal], found[again]] == [True, True]
        assert [found[other_size], found[one_raises], found[one_is_done]] == [False, False, False]
