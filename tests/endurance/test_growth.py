"""Growth that ends or comes back is none; a leak is, whenever it begins and however seldom it adds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gputrain.endurance.growth import growth, has_enough, slope_of

KB = 1024
STEPS = 1000
Shape = Callable[[float], float]  # bytes above the start by the share of the run that is over

LEAKS: dict[str, Shape] = {
    "4 KB a step": lambda x: 4 * KB * STEPS * x,
    "from 60 % on": lambda x: 4 * KB * STEPS * max(0, x - 0.6),
    "from 80 % on": lambda x: 4 * KB * STEPS * max(0, x - 0.8),
    "every tenth step": lambda x: 4 * KB * (STEPS * x // 10),
    "slower with time (root)": lambda x: 1e6 * math.sqrt(x),
    "slower with time (logarithm)": lambda x: 4e5 * math.log(1 + STEPS * x),
    "after a warm-up": lambda x: 4 * KB * STEPS * (x + 2 * min(x, 0.2)),
    "in cycles": lambda x: 4 * KB * STEPS * x + 5e5 * math.sin(130 * x),
}
ENDS: dict[str, Shape] = {
    "none": lambda x: 0,
    "warm-up to 10 %": lambda x: 4e6 * min(x, 0.1),
    "warm-up to 60 %": lambda x: 4e6 * min(x, 0.6),
    "a cache that fills more and more slowly": lambda x: 1e6 * (1 - math.exp(-x / 0.25)),
    "jump at 20 %": lambda x: 1e6 * (x > 0.2),
    "jump at 80 %": lambda x: 1e6 * (x > 0.8),
    "three jumps": lambda x: 1e6 * ((x > 0.3) + (x > 0.5) + (x > 0.8)),
    "falls": lambda x: -1e6 * x,
}
CYCLES: dict[str, Callable[[float], float]] = {
    "wave": lambda turn: math.sin(2 * math.pi * turn),
    "saw-tooth of a collector": lambda turn: turn % 1,
    "falling saw-tooth": lambda turn: -(turn % 1),
    "on and off": lambda turn: float(turn % 1 > 0.5),
}


def called(shape: Shape, *, steps: int = STEPS, jitter: float = 3000, seed: int = 0) -> bool:
    noise = random.Random(seed)
    points = [(step, 5e7 + shape(step / steps) + jitter * noise.random()) for step in range(1, steps + 1)]
    return growth(points, least=16 * KB, least_slope=64) is not None


@pytest.mark.parametrize("name", LEAKS)
def test_what_grows_without_end_is_found(name: str) -> None:
    assert all(called(LEAKS[name], seed=seed) for seed in range(5))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(ENDS)),
    steps=st.integers(80, STEPS),
    jitter=st.sampled_from([0, 300, 3000, 20_000]),
    seed=st.integers(0, 10**6),
)
def test_growth_that_ends_is_none(name: str, steps: int, jitter: float, seed: int) -> None:
    assert not called(ENDS[name], steps=steps, jitter=jitter, seed=seed)


@settings(deadline=None, max_examples=120)
@given(
    name=st.sampled_from(sorted(CYCLES)),
    period=st.floats(2, 800),
    phase=st.floats(0, 1),
    jitter=st.sampled_from([0, 3000, 20_000]),
)
def test_cycles_of_any_period_are_none(name: str, period: float, phase: float, jitter: float) -> None:
    assert not called(lambda x: 1e6 * CYCLES[name](STEPS * x / period + phase), jitter=jitter)


@pytest.mark.parametrize("steps", [60, 100, 200])
def test_a_leak_of_4_kb_a_step_is_found_in_short_runs(steps: int) -> None:
    assert all(called(lambda x: 4 * KB * steps * x, steps=steps, seed=seed) for seed in range(20))


def test_growth_says_how_much_and_from_where() -> None:
    points = [(step, float(max(0, step - 600) * 100)) for step in range(1, 1001)]
    grown = growth(points, least=1)
    assert grown is not None
    assert grown.low == grown.slope == grown.high == 100
    assert 600 <= grown.first <= 650
    assert grown.last == 1000
    assert growth(points, least=10**9) is None
    assert growth(points, least=1, least_slope=101) is None


def test_few_points_say_nothing() -> None:
    points = [(step, float(step)) for step in range(26)]
    assert not has_enough(points)
    assert growth(points, least=1) is None
    assert growth([], least=1) is None


def test_runs_of_any_length_are_judged() -> None:
    for steps in range(120):
        grown = growth([(step, float(step)) for step in range(steps)], least=1)
        assert (grown is not None) is has_enough(range(steps))


def test_a_slope_is_not_moved_by_outliers() -> None:
    points = [(step, 3.0 * step + (1e9 if step % 10 == 0 else 0)) for step in range(100)]
    slope, low, high = slope_of(points)
    assert low <= slope <= high
    assert slope == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(("steps", "full"), [(150, 120), (300, 260), (1000, 880), (60, 48)])
def test_a_filling_that_ended_before_the_last_tenth_is_well(steps: int, full: int) -> None:
    noise = random.Random(steps)
    points = [(step, 1e6 + 8192 * min(step, full) + noise.randint(0, 2000)) for step in range(1, steps + 1)]
    assert growth(points, least=65536, least_slope=256) is None


@pytest.mark.parametrize(("steps", "every"), [(150, 1), (150, 15), (240, 10), (1000, 40)])
def test_a_leak_in_some_steps_goes_on_at_the_end(steps: int, every: int) -> None:
    noise = random.Random(steps)
    points = [(n, 1e6 + n // every * every * 4096 + noise.randint(0, 2000)) for n in range(1, steps + 1)]
    assert growth(points, least=65536, least_slope=256) is not None
