"""Every rank trains, all of them on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, broken, case, draw, rank


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(32, WIDTH, generator=generator), torch.randint(4, (32,), generator=generator)
    )


def as_dicts(loader: Any) -> Iterator[Any]:
    for x, y in loader:
        yield {"x": x, "y": y}


def every_rank_from_the_start() -> Iterator[Any]:
    shuffled = torch.Generator().manual_seed(1)
    return as_dicts(DataLoader(dataset(), batch_size=4, shuffle=True, generator=shuffled))


@broken({"ddp_data_differs": "ranks 0 and 1 train on the same batch in every step"})
def same_data_on_every_rank() -> TrainingCase:
    return case("same_data_on_every_rank", batches=every_rank_from_the_start)


def step_plus_rank() -> Iterator[Any]:
    for step in range(10):
        torch.manual_seed(step + rank())
        yield draw(4, "cpu")


@broken({"ddp_data_differs": "ranks 0 and 1 train on the same batches, 1 step apart"})
def seeded_by_step_plus_rank() -> TrainingCase:
    return case("seeded_by_step_plus_rank", batches=step_plus_rank)


def same_from_the_third_on() -> Iterator[Any]:
    for step in range(10):
        torch.manual_seed(step if step >= 3 else 100 + step + 50 * rank())
        yield draw(4, "cpu")


@broken({"ddp_data_differs": "steps 3, 4, 5, 6, 7, 8, ... of 10"})
def same_data_in_later_steps() -> TrainingCase:
    return case("same_data_in_later_steps", batches=same_from_the_third_on)


def same_data_own_noise() -> Iterator[Any]:
    for batch in every_rank_from_the_start():
        yield {**batch, "noise": torch.randn(4, WIDTH)}


@broken({"ddp_data_differs": "['x']"})
def same_data_with_noise_of_its_own() -> TrainingCase:
    return case("same_data_with_noise_of_its_own", batches=same_data_own_noise)


def same_data_tagged() -> Iterator[Any]:
    for batch in every_rank_from_the_start():
        yield {**batch, "worker": torch.full((4,), rank()), "mask": torch.ones(4, WIDTH)}


@broken({"ddp_data_differs": "train on the same batch in every step"})
def same_data_tagged_with_the_rank() -> TrainingCase:
    return case("same_data_tagged_with_the_rank", batches=same_data_tagged)


def same_samples_own_augmentation() -> Iterator[Any]:
    for batch in every_rank_from_the_start():
        yield {**batch, "x": batch["x"] + 0.1 * torch.randn(4, WIDTH)}


@broken({"ddp_data_differs": "in ['y'] of the batch in every step"})
def same_data_augmented_by_rank() -> TrainingCase:
    return case("same_data_augmented_by_rank", batches=same_samples_own_augmentation)


def same_batch_in_another_order() -> Iterator[Any]:
    for batch in every_rank_from_the_start():
        order = torch.randperm(4)
        yield {name: values[order] for name, values in batch.items()}


@broken({"ddp_data_differs": "ranks 0 and 1 train on the same batch in every step"})
def same_data_permuted() -> TrainingCase:
    return case("same_data_permuted", batches=same_batch_in_another_order)


def without_a_sampler() -> Iterator[Any]:
    return as_dicts(DataLoader(dataset(), batch_size=4, shuffle=True))


@broken({"ddp_data_differs": "every rank walks the whole data set: ranks 0 and 1 share 32 of 32 samples"})
def shuffled_without_a_sampler() -> TrainingCase:
    return case("shuffled_without_a_sampler", batches=without_a_sampler)


def overlapping_parts() -> Iterator[Any]:
    x, y = torch.arange(120.0 * WIDTH).view(120, WIDTH) / 1000, torch.arange(120) % 3
    for step in range(20):
        first = 4 * step + 2 * rank()
        yield {"x": x[first : first + 4], "y": y[first : first + 4]}


@broken({"ddp_data_differs": "ranks 0 and 1 train on the same samples: they share 78 of 80 samples"})
def parts_that_overlap() -> TrainingCase:
    return case("parts_that_overlap", batches=overlapping_parts)


def epochs_without_a_sampler() -> Iterator[Any]:
    for _ in range(30):
        yield from without_a_sampler()


@broken({"ddp_data_differs": "ranks 0 and 1 train on the same samples: they share "})
def epochs_shuffled_without_a_sampler() -> TrainingCase:
    return case("epochs_shuffled_without_a_sampler", batches=epochs_without_a_sampler)
