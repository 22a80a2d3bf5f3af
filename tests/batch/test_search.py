"""The search for the largest batch size, against brute force and on curves that would mislead it."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks._curves import KINDS, LIMIT, Curve, curves
from pytest_gputrain.batch.search import STRATEGIES, SearchResult, find_maximum

LEGAL_PEAK = "legal is the peak, a number of 0 or more in the unit of capacity, or None when memory ran out"

Peak = Callable[[int], "float | None"]


class Probe:
    """Runs a curve as a machine would: None for what exceeds ``capacity``, if ``runs_out``."""

    def __init__(self, peak: Peak, capacity: float, *, runs_out: bool = True) -> None:
        self.peak, self.capacity, self.runs_out = peak, capacity, runs_out
        self.sizes: list[int] = []

    def __call__(self, size: int) -> float | None:
        assert size not in self.sizes, f"{size} is run a second time"
        self.sizes.append(size)
        peak = self.peak(size)
        return None if self.runs_out and peak is not None and peak > self.capacity else peak


def affine(size: int) -> float:
    return 100 + 7 * size


def search(
    peak: Peak,
    maximum: int = 128,
    capacity: float = 1000.0,
    minimum: int = 1,
    multiple_of: int = 1,
    divides: int | None = None,
    strategy: str = "model",
    predicted: Callable[[int], float] | None = None,
    known: Mapping[int, float | None] | None = None,
) -> SearchResult:
    return find_maximum(
        Probe(peak, capacity), minimum=minimum, maximum=maximum, capacity=capacity, multiple_of=multiple_of,
        divides=divides, strategy=strategy, predicted=predicted, known=known,
    )  # fmt: skip


def sizes_of(result: SearchResult) -> list[int]:
    return [size for size, _ in result.probes]


def ran_out(result: SearchResult, capacity: float) -> int:
    return sum(peak is None or peak > capacity for _, peak in result.probes)


def find(curve: Curve, strategy: str = "model", runs_out: bool = True) -> SearchResult:
    probe = Probe(curve.peak, curve.capacity, runs_out=runs_out)
    result = find_maximum(probe, maximum=LIMIT, capacity=curve.capacity, strategy=strategy)
    assert result.size == curve.exact
    # A tile of 16 samples may double what is needed from one size to the next: that is worth a word.
    assert result.warning is None or curve.kind == "stepped"
    assert sizes_of(result) == probe.sizes
    return result


def percentile_95(numbers: list[int]) -> int:
    return sorted(numbers)[math.ceil(0.95 * len(numbers)) - 1]


# --- the figures of the issue


@pytest.mark.parametrize("runs_out", [True, False], ids=["none", "peak"])
def test_affine_takes_four_probes_and_runs_out_once(runs_out: bool) -> None:
    drawn = curves("affine", 80)
    results = [find(curve, runs_out=runs_out) for curve in drawn]
    assert statistics.median(len(result.probes) for result in results) <= 4
    counts = [ran_out(result, curve.capacity) for result, curve in zip(results, drawn, strict=True)]
    assert max(counts) <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_never_more_probes_than_doubling_and_bisecting(seed: int) -> None:
    for kind in KINDS:
        drawn = curves(kind, 80, seed)
        ours = percentile_95([len(find(curve).probes) for curve in drawn])
        classic = percentile_95([len(find(curve, "exponential").probes) for curve in drawn])
        assert ours <= classic, kind


# --- exactness


monotone = st.lists(st.integers(0, 50), min_size=1, max_size=200).map(
    lambda rises: [sum(rises[: number + 1]) for number in range(len(rises))]
)


@given(
    peaks=monotone,
    capacity=st.integers(1, 3000),
    minimum=st.integers(1, 9),
    multiple_of=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    runs_out=st.booleans(),
)
def test_any_curve_that_grows_is_searched_to_the_exact_maximum(
    peaks: list[int], capacity: int, minimum: int, multiple_of: int, strategy: str, runs_out: bool
) -> None:
    maximum = len(peaks) + 20
    probe = Probe(lambda size: peaks[min(size, len(peaks)) - 1], capacity, runs_out=runs_out)
    result = find_maximum(
        probe, minimum=minimum, maximum=maximum, capacity=capacity, multiple_of=multiple_of, strategy=strategy
    )
    legal = [size for size in range(minimum, maximum + 1) if size % multiple_of == 0]
    assert result.size == max((s for s in legal if peaks[min(s, len(peaks)) - 1] <= capacity), default=0)
    assert len(result.probes) <= 2 * math.log2(maximum) + 4


@given(
    st.dictionaries(st.integers(1, 40), st.one_of(st.none(), st.integers(0, 200)), max_size=12),
    st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=40, max_size=40),
    st.sampled_from(STRATEGIES),
    st.sampled_from([None, lambda size: 4.0 * size, lambda size: -1.0, lambda size: 1e9 + size]),
)
def test_any_answer_is_verified_on_any_curve(
    known: dict[int, float | None],
    peaks: list[float | None],
    strategy: str,
    predicted: Callable[[int], float] | None,
) -> None:
    result = search(
        lambda size: peaks[size - 1], 40, 100.0, known=known, strategy=strategy, predicted=predicted
    )
    seen = {**known, **dict(result.probes)}
    assert result.size == 0 or fits(seen[result.size])
    assert result.size == 40 or not fits(seen[result.size + 1])


def fits(peak: float | None, capacity: float = 100.0) -> bool:
    return peak is not None and peak <= capacity


@given(st.integers(1, 10**6), st.integers(1, 5000), st.floats(0.3, 3), st.integers(0, 10**6))
def test_a_wrong_prediction_costs_little_and_changes_nothing(
    fixed: int, slope: int, wrong: float, room: int
) -> None:
    capacity = fixed + room

    def peak(size: int) -> float:
        return fixed + slope * size

    exact = min(4096, room // slope)
    result = search(peak, 4096, capacity, predicted=lambda size: wrong * peak(size))
    assert result.size == exact
    assert len(result.probes) <= 16


def test_noise_ends_within_noise() -> None:
    noise = 0.01
    for kind in KINDS:
        for number, curve in enumerate(curves(kind, 40)):
            random_ = random.Random(number)

            def noisy(size: int, curve: Curve = curve, random_: random.Random = random_) -> float:
                return curve.peak(size) * (1 + random_.uniform(-noise, noise))

            result = search(noisy, LIMIT, curve.capacity)
            if result.size:
                assert curve.peak(result.size) <= curve.capacity * (1 + 2 * noise)
            if result.size < LIMIT:
                assert curve.peak(result.size + 1) >= curve.capacity * (1 - 2 * noise)


# --- what is run


def test_the_classic_order() -> None:
    result = search(lambda size: size, 128, 52, strategy="exponential")
    assert (result.size, sizes_of(result)) == (52, [1, 2, 4, 8, 16, 32, 64, 48, 56, 52, 54, 53])


def test_a_line_is_run_at_four_sizes() -> None:
    result = search(affine, 4096)
    assert result.probes == ((1, 107), (9, 163), (128, 996), (129, None))
    assert result.warning is None


def test_all_that_may_fit_fits() -> None:
    result = search(affine, 100)
    assert (result.size, sizes_of(result)) == (100, [1, 9, 100])


def test_a_right_prediction_is_confirmed_in_two_probes() -> None:
    assert sizes_of(search(affine, 4096, predicted=affine)) == [128, 129]
    assert sizes_of(search(affine, 100, predicted=affine)) == [100]


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_prediction_wrong_twofold(wrong: float) -> None:
    result = search(affine, 4096, predicted=lambda size: wrong * affine(size))
    assert result.size == 128
    assert len(result.probes) <= 6


@pytest.mark.parametrize("useless", [math.nan, math.inf, -1.0, 0.0, 7.0])
def test_a_prediction_that_is_none_is_ignored(useless: float) -> None:
    assert search(affine, 4096, predicted=lambda size: useless) == search(affine, 4096)


def test_flat_memory_is_bounded() -> None:
    result = search(lambda size: 10, 10**6)
    assert result.size == 10**6
    assert len(result.probes) <= 10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("exact", [1, 2, 3, 977, 999_999, 10**6])
def test_a_huge_maximum(exact: int, strategy: str) -> None:
    result = search(lambda size: 5 * size, 10**6, 5 * exact, strategy=strategy)
    assert result.size == exact
    assert len(result.probes) <= (4 if strategy == "model" else 40)


def test_unlimited_capacity_ends_where_memory_does() -> None:
    result = find_maximum(Probe(affine, 1000.0), maximum=4096, capacity=math.inf)
    assert result.size == 128
    assert search(affine, 4096, math.inf).size == 4096


def test_a_peak_above_capacity_does_not_fit_without_running_out() -> None:
    result = find_maximum(affine, maximum=4096, capacity=1000)
    assert (result.size, result.probes[-1]) == (128, (129, 1003))


# --- which sizes are legal


def test_only_divisors_are_run() -> None:
    result = search(affine, divides=96)
    assert result.size == 96
    result = search(affine, 4096, capacity=700, divides=96, multiple_of=4)
    assert (result.size, set(sizes_of(result)) <= {4, 8, 12, 16, 24, 32, 48, 96}) == (48, True)


def test_only_multiples_are_run_from_the_first_legal_one() -> None:
    result = search(affine, minimum=10, multiple_of=16)
    assert result.size == 128
    assert sizes_of(result)[0] == 16
    assert all(size % 16 == 0 for size in sizes_of(result))


# --- nothing fits, or not as memory should


def test_nothing_fits() -> None:
    assert search(lambda size: 2000.0).size == 0
    result = find_maximum(lambda size: 2000, minimum=4, maximum=64, capacity=1000)
    assert (result.size, result.probes) == (0, ((4, 2000),))
    assert result.warning == "no batch size fits: 4, the smallest, needs 2000 of 1000"
    result = search(lambda size: None)
    assert result.warning == "no batch size fits: 1, the smallest, needs more than it could get of 1000"


def test_a_larger_size_that_fits_where_a_smaller_one_does_not() -> None:
    result = search(affine, 128, known={64: 990, 32: None, 65: None})
    assert (result.size, result.probes) == (64, ())
    assert result.warning == "64 fits although 32 did not: sizes below 64 may run out of memory"


def test_a_falling_peak_is_told() -> None:
    result = search(lambda size: 900 if size < 8 else affine(size), 64)
    assert result.size == 64
    assert result.warning == "the peak falls from 900 at 2 to 212 at 16: more may fit"


def test_a_size_that_does_not_fit_amid_others_that_do_is_told() -> None:
    result = search(lambda size: None if 20 <= size < 32 or size > 100 else affine(size), 24)
    assert result.size == 19
    assert 20 in sizes_of(result)
    assert result.warning == "20 does not fit although 19 takes 233 of 1000: more may fit"


# --- what was known before


def test_what_is_known_is_not_run_again() -> None:
    first = search(affine, 4096)
    again = search(affine, 4096, known=dict(first.probes))
    assert (again.size, again.probes) == (128, ())
    smaller = search(affine, 4096, capacity=800, known=dict(first.probes))
    assert (smaller.size, sizes_of(smaller)) == (100, [100, 101])


def test_known_sizes_that_are_wrong() -> None:
    def twice(size: int) -> float:
        return affine(size) * 2

    result = search(twice, 128, known={1: 107, 9: 163})  # they mislead, no more
    assert (result.size, result.warning) == (57, None)
    result = search(twice, 128, known={80: 660})  # that is believed
    assert (result.size, 81 in sizes_of(result)) == (80, True)
    result = search(affine, 128, known={9: None})
    assert result.size == 8
    assert result.warning == "9 does not fit although 8 takes 156 of 1000: more may fit"


def test_known_sizes_that_are_not_legal_still_guide() -> None:
    result = search(affine, 4096, multiple_of=16, known={1: 107, 9: 163, 129: None})
    assert (result.size, sizes_of(result)) == (128, [128, 144])


# --- errors


def test_what_a_probe_raises_is_no_lack_of_memory() -> None:
    def probe(size: int) -> float:
        raise TypeError("forward() got an unexpected keyword")

    with pytest.raises(TypeError, match="unexpected keyword"):
        find_maximum(probe, maximum=8, capacity=1)


@pytest.mark.parametrize("peak", [math.nan, "12", True, -1, [1]])
def test_a_peak_that_is_none(peak: object) -> None:
    message = f"the result of probe(1) is {peak!r}; {LEGAL_PEAK}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_maximum(lambda size: peak, maximum=8, capacity=1)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minimum": 0}, "minimum is 0; legal is a whole number of 1 or more"),
        ({"minimum": True}, "minimum is True; legal is a whole number of 1 or more"),
        ({"maximum": 2.5}, "maximum is 2.5; legal is a whole number of 1 or more"),
        ({"minimum": 9}, "minimum 9 is above maximum 8; legal is 1 <= minimum <= maximum"),
        ({"multiple_of": -8}, "multiple_of is -8; legal is a whole number of 1 or more"),
        ({"divides": 0}, "divides is 0; legal is a whole number of 1 or more"),
        ({"capacity": 0}, "capacity is 0; legal is a number above 0, in the unit of the peaks"),
        ({"capacity": math.nan}, "capacity is nan; legal is a number above 0, in the unit of the peaks"),
        ({"capacity": "8GB"}, "capacity is '8GB'; legal is a number above 0, in the unit of the peaks"),
        ({"strategy": "binary"}, "strategy is 'binary'; legal are 'model', 'exponential'"),
        ({"known": {3: math.nan}}, f"known[3] is nan; {LEGAL_PEAK}"),
        ({"known": {"3": 1.0}}, "a size in known is '3'; legal is a whole number of 1 or more"),
        (
            {"minimum": 4, "multiple_of": 16},
            "no batch size from 4 to 8 is a multiple of 16; the nearest: 16",
        ),
        (
            {"minimum": 6, "divides": 20},
            "no batch size from 6 to 8 divides 20; the nearest: 5 and 10",
        ),
        (
            {"divides": 9, "multiple_of": 2},
            "no batch size from 1 to 8 is a multiple of 2 and divides 9; no other size does either",
        ),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    legal: dict[str, object] = {"maximum": 8, "capacity": 1}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_maximum(lambda size: 1.0, **{**legal, **arguments})  # type: ignore[arg-type]
