"""Healthy streams in which ranks have something in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_data import as_dicts, dataset
from tests.planted.plant import WIDTH, case, draw, healthy, healthy_but


def bucketed_batches() -> Iterator[Any]:
    """All ranks agree on a length, so that none waits for the longest."""
    agreed = torch.Generator().manual_seed(7)
    for _ in range(30):
        length = int(torch.randint(1, 4, (), generator=agreed)) * 4
        positions = torch.arange(length).expand(4, length)
        x = torch.randn(4, length, WIDTH)
        yield {"x": x, "y": torch.randint(4, (4,)), "positions": positions, "mask": torch.ones(4, length)}


def longest_bucket(batch_size: int, device: Any) -> Any:
    x = torch.randn(batch_size, 12, WIDTH)
    return {"x": x.to(device), "y": torch.randint(4, (batch_size,)).to(device)}


def pooled_loss(model: Any, batch: Any) -> Tensor:
    out = model(batch["x"])
    return F.cross_entropy(out.mean(1) if out.dim() == 3 else out, batch["y"])


@healthy_but("compile_no_recompiles")  # each length is a shape of its own
def length_buckets_all_ranks_share() -> TrainingCase:
    return case(
        "length_buckets_all_ranks_share", batch=longest_bucket, batches=bucketed_batches, loss=pooled_loss
    )


def batches_of_one_task() -> Iterator[Any]:
    agreed = torch.Generator().manual_seed(7)
    tasks = torch.arange(5 * 32.0).view(5, 32)
    for _ in range(30):
        yield {**draw(4, "cpu"), "task": tasks[int(torch.randint(0, 5, (), generator=agreed))]}


@healthy
def task_embedding_all_ranks_share() -> TrainingCase:
    return case("task_embedding_all_ranks_share", batches=batches_of_one_task)


def with_replacement() -> Iterator[Any]:
    everything = dataset()[:8]
    for _ in range(200):
        chosen = torch.randint(8, (4,))
        yield {"x": everything[0][chosen], "y": everything[1][chosen]}


@healthy
def random_samples_of_a_tiny_data_set() -> TrainingCase:
    return case("random_samples_of_a_tiny_data_set", batches=with_replacement)


def parts_in_turn() -> Iterator[Any]:
    """Each epoch a rank walks the part that the rank before it had."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for epoch in range(world):
        part = torch.utils.data.Subset(dataset(), range((rank + epoch) % world, 32, world))
        yield from as_dicts(torch.utils.data.DataLoader(part, batch_size=4, shuffle=True))


@healthy
def parts_that_ranks_take_in_turn() -> TrainingCase:
    return case("parts_that_ranks_take_in_turn", batches=parts_in_turn)


def epochs_shuffled_together() -> Iterator[Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    everything = dataset()[:]
    for epoch in range(40):
        agreed = torch.Generator().manual_seed(epoch)
        order = torch.randperm(32, generator=agreed)[rank::world]
        for chosen in order.split(4):
            yield {"x": everything[0][chosen], "y": everything[1][chosen]}


@healthy
def epochs_shuffled_anew() -> TrainingCase:
    return case("epochs_shuffled_anew", batches=epochs_shuffled_together)
