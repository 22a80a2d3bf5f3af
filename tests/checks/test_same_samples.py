"""Samples shared by two ranks: what is chance and what is not, without ranks."""

from __future__ import annotations

import random

import pytest

from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.checks.same_samples import Samples, judge_samples


def batches(order: list[int], size: int = 4) -> Samples:
    names = [str(number) for number in order]
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


def alarm(one: list[int], other: list[int], size: int = 4) -> bool:
    try:
        judge_samples(batches(one, size), batches(other, size), "ranks 0 and 1", 2, True, {})
    except CheckFailed:
        return True
    return False


def shuffled(rng: random.Random, size: int) -> list[int]:
    return rng.sample(range(size), size)


@pytest.mark.parametrize("size", [8, 100, 20_000])
def test_drawing_at_random_from_the_same_set_is_chance(size: int) -> None:
    rng = random.Random(size)
    for _ in range(20):
        with_replacement = [[rng.randrange(size) for _ in range(1200)] for _ in range(2)]
        assert not alarm(with_replacement[0], with_replacement[1])
        a_batch_at_a_time = [[n for _ in range(100) for n in rng.sample(range(size), 8)] for _ in range(2)]
        assert not alarm(a_batch_at_a_time[0], a_batch_at_a_time[1], size=8)


@pytest.mark.parametrize("size", [8, 64, 400])
def test_parts_shuffled_anew_in_each_epoch_are_chance(size: int) -> None:
    rng = random.Random(size)
    for _ in range(20):
        epochs = [shuffled(rng, size) for _ in range(7)]
        one, other = ([n for epoch in epochs for n in epoch[rank::2]] for rank in range(2))
        assert not alarm(one[: 3 * size], other[: 3 * size])
        padded = [shuffled(rng, size + 1)[:1] + epochs[0][rank::2] for rank in range(2)]
        assert not alarm(padded[0], padded[1])


@pytest.mark.parametrize(("size", "drawn"), [(32, 32), (32, 320), (300, 120), (10_000, 2000)])
def test_every_rank_walking_the_whole_set_is_not(size: int, drawn: int) -> None:
    rng = random.Random(size)
    caught = 0
    for _ in range(20):
        one, other = ([n for _ in range(10) for n in shuffled(rng, size)][:drawn] for _ in range(2))
        caught += alarm(one, other)
    assert caught >= 19
