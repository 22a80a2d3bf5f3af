"""What loops say of their own speed, against records of known steps."""

from __future__ import annotations

from statistics import fmean, median

import pytest

from pytest_gputrain.compile.claims import Claim, Judgement, Seen, SeenStep, judge, same_tokens

STEP, LAUNCH, COMPILE, EVALUATION = 0.1, 0.01, 3.0, 0.8
TOKENS, USEFUL = 8192, 6000


def record(*, steps: int = 20, evaluations: tuple[int, ...] = (), useful: int = USEFUL) -> Seen:
    """A device that takes 100 ms a step behind a host that takes 10; the first step compiles for 3 s."""
    now, free = 0.0, 0.0
    seen, apart = [], []
    for number in range(steps):
        started, now = now, now + LAUNCH + (COMPILE if number == 0 else 0.0)
        free = max(free, now) + STEP
        seen.append(SeenStep(started, now, free, TOKENS, useful))
        if number in evaluations:
            apart.append((free, free + EVALUATION))
            now = free = free + EVALUATION
    return Seen(seen, apart)


PLAIN, EVALUATED = record(), record(evaluations=(9, 19))


def seconds(value: float, seen: Seen = PLAIN) -> str | None:
    return judge(Claim(value), seen).problem


@pytest.mark.parametrize("value", [STEP, 0.105, 0.09])
def test_an_honest_average_is_right(value: float) -> None:
    assert seconds(value) is None
    assert seconds(value, EVALUATED) is None


@pytest.mark.parametrize("measure", [fmean, median])
def test_any_half_of_the_steps_may_be_averaged(measure: object) -> None:
    busy = [0.1] * 5 + [0.2] * 5 + [0.1] * 10
    slower = Seen([SeenStep(float(i), i + 0.01, i + one, TOKENS, USEFUL) for i, one in enumerate(busy)])
    assert callable(measure)
    assert seconds(measure(busy[5:]), slower) is None
    assert seconds(measure(busy[10:]), slower) is None


@pytest.mark.parametrize(
    ("value", "seen", "words"),
    [
        (LAUNCH, PLAIN, "the clock is read without waiting for the device"),
        ((COMPILE + 20 * STEP) / 20, PLAIN, "the first steps, which compile, are counted"),
        ((15 * STEP + 2 * EVALUATION) / 15, EVALUATED, "evaluation or saving is counted as training"),
        ((COMPILE + 20 * STEP + 2 * EVALUATION) / 20, EVALUATED, "which compile, and evaluation are counted"),
        (5.0, PLAIN, "5e+03 ms, 50 times that"),
    ],
)
def test_mistakes_are_told_by_what_they_come_to(value: float, seen: Seen, words: str) -> None:
    problem = seconds(value, seen)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(("tokens", "counts"), [(TOKENS, "padded"), (USEFUL, "useful")])
def test_either_kind_of_tokens_may_be_counted(tokens: int, counts: str) -> None:
    assert judge(Claim(STEP, tokens / STEP), PLAIN) == Judgement(None, counts)
    assert judge(Claim(None, tokens / STEP), PLAIN) == Judgement(None, counts)


def test_without_padding_there_is_one_kind() -> None:
    assert judge(Claim(STEP, TOKENS / STEP), record(useful=TOKENS)) == Judgement(None, None)


def test_other_tokens_are_told_with_the_numbers() -> None:
    assert judge(Claim(STEP, 7000 / STEP), PLAIN).problem == (
        "a step has 6000 tokens that count in the loss or 8192 tokens in all, but the rate counts 7000"
    )


def test_a_rate_alone_tells_the_same_mistakes() -> None:
    problem = judge(Claim(None, TOKENS / LAUNCH), PLAIN).problem
    assert problem is not None
    assert "without waiting for the device" in problem


def test_two_sides_have_to_count_alike() -> None:
    useful, padded, unknown = Judgement(None, "useful"), Judgement(None, "padded"), Judgement(None)
    assert same_tokens(useful, useful) is None
    assert same_tokens(useful, unknown) is None
    assert same_tokens(useful, padded) == (
        "tokens are counted differently: useful ones for eager, padded ones for compiled; count them alike "
        "on "
        "both sides"
    )


@pytest.mark.parametrize("claim", [{}, {"seconds_per_step": 0.0}, {"tokens_per_second": -1.0}])
def test_a_claim_has_to_say_something(claim: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it has to give at least one, above 0"):
        Claim(**claim)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the meter ran 5 steps; more than 5 are needed$"):
        judge(Claim(STEP), record(steps=5))
