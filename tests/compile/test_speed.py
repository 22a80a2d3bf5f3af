"""The arithmetic of eager against compiled."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from pytest_gputrain.compile.speed import (
    Block,
    Ratio,
    Side,
    SpeedReport,
    compare,
    grade,
    percentile,
    settled,
    shortcomings,
    side_of,
    spread,
)

GIB = 2**30


def blocks(*seconds: float, steps: int = 10, useful: int = 60) -> list[Block]:
    return [Block(one, steps, 100 * steps, useful * steps) for one in seconds]


def test_the_ratio_is_of_blocks_timed_together() -> None:
    # The machine is half as fast in the last two blocks, which the ratio does not see.
    ratio = compare(blocks(3.0, 3.0, 6.0, 6.0), blocks(2.0, 2.0, 4.0, 4.0))
    assert ratio.each == pytest.approx([1.5] * 4)
    assert (ratio.low, ratio.high) == pytest.approx((1.5, 1.5))


def test_one_slow_block_moves_the_spread_and_not_the_ratio() -> None:
    ratio = compare(blocks(*[3.0] * 10), blocks(*[2.0] * 9, 20.0))
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    few = compare(blocks(3.0, 3.0, 3.0), blocks(2.0, 2.0, 20.0))
    assert (few.median, few.low, few.high) == pytest.approx((1.5, 0.15, 1.5))


@pytest.mark.parametrize(("what", "field"), [("tokens", "tokens"), ("useful tokens", "useful")])
def test_tokens_counted_differently_are_refused(what: str, field: str) -> None:
    other = dataclasses.replace(blocks(2.0)[0], **{field: 590})
    own = getattr(blocks(3.0)[0], field) / 10
    with pytest.raises(
        ValueError, match=rf"^eager counts {own:g} {what} a step, compiled 59: the same batches"
    ):
        compare(blocks(3.0), [other])


def test_blocks_of_unequal_length_compare_by_step() -> None:
    assert compare(blocks(3.0), [Block(4.0, 20, 2000, 1200)]).median == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (blocks(1.0, 1.0), blocks(1.0), "2 blocks of eager against 1 of compiled; time them in turn"),
        ([], [], "0 blocks of eager against 0 of compiled"),
        (blocks(0.0), blocks(1.0), r"a block of eager has 10 steps in 0.0 s; both must be above 0"),
        (blocks(1.0), blocks(1.0, steps=0), "a block of compiled has 0 steps in 1.0 s"),
    ],
)
def test_what_cannot_be_compared_is_refused(one: list[Block], other: list[Block], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(one, other)


def test_the_spread_holds_the_median_as_often_as_it_says() -> None:
    drawn = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = spread([drawn.gauss(1.4, 0.1) for _ in range(10)])
        held += low <= 1.4 <= high
    assert held / 2000 >= 0.95


@pytest.mark.parametrize(("part", "value"), [(0, 1.0), (0.5, 2.5), (0.95, 3.85), (1, 4.0)])
def test_percentiles_are_linear_in_between(part: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], part) == pytest.approx(value)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^percentile 0.5 of 0 values; give 0 to 1, and at least one value$"
    ):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("seconds", "first"), [({}, 5), ({0: 9.0, 1: 0.5}, 5), ({0: 9.0, 7: 0.1, 9: 0.0}, 8)]
)
def test_the_first_five_steps_and_all_that_compile_are_left_out(
    seconds: dict[int, float], first: int
) -> None:
    assert settled(seconds) == first


def test_tokens_are_counted_over_all_blocks() -> None:
    side = side_of(blocks(2.0, 3.0), [0.2] * 9 + [0.3], GIB)
    assert (side.tokens_per_second, side.useful_per_second) == (400.0, 240.0)
    assert side.p50 == pytest.approx(0.2)
    assert 0.2 < side.p95 < 0.3


def report(ratio: float = 1.5, seconds: float = 20.0, memory: float = 1.0, **fields: object) -> SpeedReport:
    one = Side((0.3,), 100.0, 60.0, GIB)
    other = Side((0.2,), 100.0 * ratio, 60.0 * ratio, int(memory * GIB))
    made = SpeedReport(
        case="gpt", device="cuda", world_size=1, eager=one, compiled=other,
        ratio=Ratio(ratio, ratio - 0.05, ratio + 0.05, (ratio,)), first_compile_seconds=seconds, warm_up=6,
        tokens_per_step=100, useful_per_step=60,
    )  # fmt: skip
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def test_what_meets_the_bars_has_no_shortcoming() -> None:
    assert shortcomings(report()) == []
    assert shortcomings(report(1.3, 60.0, 1.1)) == []
    assert shortcomings(report(memory=0.5)) == []


def test_each_bar_has_its_words() -> None:
    assert shortcomings(report(1.1, 75.0, 1.25)) == [
        "compiled trains 1.10 (1.05 to 1.15, 1 pairs of blocks) times as fast as eager, below 1.3 (faster, "
        "but "
        "below 1.3): 110 tokens/s against 100",
        "the first compile took 75 s, more than 60 s",
        "compiled needs 25% more memory at its peak, more than 10%: 1280 MiB against 1024 MiB",
    ]


@pytest.mark.parametrize(
    ("low", "middle", "high", "words"),
    [
        (1.4, 1.5, 1.6, "faster: 1.40 and more"),
        (1.2, 1.35, 1.5, "faster, though the spread reaches below 1.3"),
        (1.1, 1.25, 1.4, "faster, but below 1.3 by less than the spread"),
        (1.05, 1.1, 1.15, "faster, but below 1.3"),
        (0.9, 1.05, 1.2, "no gain that can be told from noise"),
        (0.8, 0.9, 0.95, "slower"),
    ],
)
def test_grades(low: float, middle: float, high: float, words: str) -> None:
    assert grade(Ratio(middle, low, high, (middle,))) == words


def test_memory_that_was_not_measured_is_not_judged() -> None:
    on_cpu = report(compiled=Side((0.2,), 150.0, 90.0, None))
    assert on_cpu.memory_ratio is None
    assert shortcomings(on_cpu) == []


def test_a_report_is_plain_json() -> None:
    assert json.loads(json.dumps(report().to_json()))["ratio"]["median"] == 1.5
