"""Loss curves, and samples of what depends on chance."""

from __future__ import annotations

import math
import random

import pytest

from pytest_gputrain.compile.draws import differ
from pytest_gputrain.compile.trajectory import BAND, part, smooth

FALLING = [2.0 * 0.97**step + 0.3 for step in range(100)]
ROUNDED = [loss * (1 + 1e-6) for loss in FALLING]


def test_the_same_curve_stays_inside() -> None:
    parting = part(FALLING, ROUNDED, [ROUNDED])
    assert parting.at is None
    assert parting.judged == 100
    assert parting.worst == pytest.approx(1e-6, rel=0.01)


@pytest.mark.parametrize("off", [1.1, 0.9])
def test_a_curve_that_is_ten_per_cent_off_leaves_in_the_first_step(off: float) -> None:
    assert part(FALLING, [loss * off for loss in FALLING], [ROUNDED]).at == 0


def test_a_curve_that_stops_falling_leaves_where_it_is_5_per_cent_off() -> None:
    stuck = [*FALLING[:40], *[FALLING[40]] * 60]
    parting = part(FALLING, stuck, [ROUNDED])
    assert parting.at is not None and 40 < parting.at < 60
    assert parting.worst > BAND


def test_one_loss_that_jumps_is_no_parting() -> None:
    jumping = [*FALLING[:50], FALLING[50] * 1.3, *FALLING[51:]]
    assert part(FALLING, jumping, [ROUNDED]).at is None


def test_the_band_is_as_wide_as_eager_runs_are_apart() -> None:
    drifting = [loss * (1 + 0.001 * step) for step, loss in enumerate(FALLING)]
    further = [loss * (1 + 0.002 * step) for step, loss in enumerate(FALLING)]
    assert part(FALLING, further, [ROUNDED]).at is not None
    assert part(FALLING, further, [drifting]).at is None


def test_what_is_chaos_in_eager_is_not_judged() -> None:
    exploding = [*FALLING[:30], *[9.0] * 70]
    parting = part(FALLING, exploding, [exploding])
    assert parting.at is None
    assert 30 <= parting.judged < 40


def test_nothing_is_nothing_when_the_loss_is_zero() -> None:
    vanishing = [2.0 * 0.5**step for step in range(100)]
    assert (
        part(vanishing, [loss * 3 if step > 20 else loss for step, loss in enumerate(vanishing)], []).at
        is None
    )


def test_nan_leaves() -> None:
    assert part(FALLING, [*FALLING[:5], *[math.nan] * 95], [ROUNDED]).at == 5


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^loss curves of \[99, 100\] steps; they must be equally long, 1 or more$"
    ):
        part(FALLING, FALLING[:99], [])


def test_the_window_begins_short() -> None:
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 1.5, 2.0]


def sample(seed: int, mean: float, deviation: float, number: int = 32) -> list[float]:
    drawn = random.Random(seed)
    return [drawn.gauss(mean, deviation) for _ in range(number)]


def test_samples_of_one_distribution_are_never_told_apart() -> None:
    pairs = [
        differ(sample(seed, 1, 0.3, 16), sample(seed + 10_000, 1, 0.3, 16), 1e-4) for seed in range(3000)
    ]
    assert not [one for one in pairs if one.real]


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.3), (1.0, 0.0), (1.0, 3.0), (2.0, 0.3)])
def test_another_mean_or_spread_is_seen(mean: float, deviation: float) -> None:
    assert differ(sample(1, 1, 0.3), sample(2, mean, deviation), 1e-4).real


def test_rounding_is_no_difference() -> None:
    assert not differ([1.0] * 16, [1.00005] * 16, 1e-4).real
    assert differ([1.0] * 16, [1.01] * 16, 1e-4).real
