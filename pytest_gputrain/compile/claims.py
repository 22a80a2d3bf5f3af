"""Is what a training loop says of its own speed what our clock saw? Arithmetic over records. Imports no
torch.

A claim is right when it is what some honest way to average the steady steps gives. Where it is none, the
usual mistakes are tried in turn on the same records: the one that gives the claim is the likely cause.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from pytest_gputrain.compile.speed import WARM_UP

# A loop spends time of its own between steps, and a busy machine takes some from both clocks unlike.
TOLERANCE = 0.15
# Tokens are counted, not measured.
TOKENS_TOLERANCE = 0.03
UNSYNCHRONISED = "the clock is read without waiting for the device"
# Runs of steps that are tried, from this many beginnings to as many ends.
PLACES = 24


@dataclass(frozen=True)
class SeenStep:
    """One call of the training step. Seconds on one clock: ``returned`` to the caller, ``finished`` on the
    device.

    tokens: all positions; useful: those that count in the loss.
    """

    started: float
    returned: float
    finished: float
    tokens: int
    useful: int


@dataclass(frozen=True)
class Seen:
    """All that ran while a loop measured itself. apart: (started, finished) of evaluation and saving."""

    steps: Sequence[SeenStep]
    apart: Sequence[tuple[float, float]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Claim:
    """What a loop says of itself; one of them may be missing. Raises ValueError where both are, or not above
    0.
    """

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.seconds_per_step, self.tokens_per_second) if value is not None]
        if not given or not all(value > 0 for value in given):
            raise ValueError(
                f"a meter said seconds_per_step {self.seconds_per_step!r}, tokens_per_second "
                f"{self.tokens_per_second!r}; it has to give at least one, above 0"
            )


@dataclass(frozen=True)
class Judgement:
    """problem: None where the claim is right. counts: "useful" or "padded", whichever tokens it counts; None
    where it says nothing of tokens, or where both are as many.
    """

    problem: str | None
    counts: str | None = None


def judge(claim: Claim, seen: Seen) -> Judgement:
    """The claim against the record. Raises ValueError for fewer than ``WARM_UP`` + 1 steps."""
    if len(seen.steps) <= WARM_UP:
        raise ValueError(f"the meter ran {len(seen.steps)} steps; more than {WARM_UP} are needed")
    if claim.seconds_per_step is None:
        return _by_rate(claim, seen)
    if problem := _wrong_seconds(claim.seconds_per_step, seen):
        return Judgement(problem)
    if claim.tokens_per_second is None:
        return Judgement(None)
    return _counted(claim.tokens_per_second * claim.seconds_per_step, seen)


def same_tokens(eager: Judgement, compiled: Judgement) -> str | None:
    """One line where the two sides count different tokens."""
    if None in (eager.counts, compiled.counts) or eager.counts == compiled.counts:
        return None
    return (
        f"tokens are counted differently: {eager.counts} ones for eager, {compiled.counts} ones for "
        "compiled; "
        "count them alike on both sides"
    )


def _by_rate(claim: Claim, seen: Seen) -> Judgement:
    """Where only tokens a second are given: right if either way to count gives honest seconds."""
    assert claim.tokens_per_second is not None
    seconds = {name: tokens / claim.tokens_per_second for name, tokens in _tokens(seen).items()}
    right = [name for name, value in seconds.items() if _wrong_seconds(value, seen) is None]
    if right:
        return Judgement(None, right[0] if len(right) == 1 and len(seconds) > 1 else None)
    problems = [_wrong_seconds(value, seen) or "" for value in seconds.values()]
    return Judgement(next((problem for problem in problems if "likely" in problem), problems[0]))


def _tokens(seen: Seen) -> dict[str, float]:
    steady = seen.steps[WARM_UP:]
    counted = {
        "useful": fmean(step.useful for step in steady),
        "padded": fmean(step.tokens for step in steady),
    }
    return counted if counted["useful"] != counted["padded"] else {"padded": counted["padded"]}


def _counted(tokens: float, seen: Seen) -> Judgement:
    """Which tokens are these, a step?"""
    ways = _tokens(seen)
    near = {name: abs(tokens / count - 1) for name, count in ways.items() if count}
    name = min(near, key=lambda key: near[key])
    if near[name] <= TOKENS_TOLERANCE:
        return Judgement(None, name if len(ways) > 1 else None)
    legal = " or ".join(f"{count:.0f} {_WORDS[name]}" for name, count in ways.items())
    return Judgement(f"a step has {legal}, but the rate counts {tokens:.0f}")


_WORDS = {"useful": "tokens that count in the loss", "padded": "tokens in all"}


def _wrong_seconds(claimed: float, seen: Seen) -> str | None:
    steady = seen.steps[WARM_UP:]
    busy = _busy(seen.steps)[WARM_UP:]
    right = itertools.chain(_averages(busy), _averages(_periods(steady, seen.apart)))
    if any(_near(claimed, value) for value in right):
        return None
    honest = fmean(busy)
    told = f"a step takes {_ms(honest)}, but the meter says {_ms(claimed)}"
    tried = [
        (abs(claimed - value), mistake, value) for mistake, values in _mistakes(seen) for value in values
    ]
    # Waiting too little makes steps shorter, everything else longer.
    nearest = min(
        (one for one in tried if _near(claimed, one[2]) and (one[2] < honest) == (claimed < honest)),
        default=None,
    )
    if nearest is None:
        return f"{told}, {claimed / honest:.2g} times that"
    return f"{told}\n  likely: {nearest[1]}"


def _averages(values: Sequence[float]) -> Iterator[float]:
    """Every honest average: of any run of steps that is at least half of them, its mean and its median."""
    least = max(1, len(values) // 2)
    stride = max(1, len(values) // PLACES)
    places = [*range(0, len(values), stride), len(values)]
    for start, stop in itertools.combinations(places, 2):
        if stop - start >= least:
            yield fmean(values[start:stop])
            yield median(values[start:stop])


def _busy(steps: Sequence[SeenStep]) -> list[float]:
    """Seconds that each step took, until the device was done with it."""
    found, free = [], float("-inf")
    for step in steps:
        found.append(step.finished - max(step.started, free))
        free = step.finished
    return found


def _periods(steps: Sequence[SeenStep], apart: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds from one step's end to the next one's: with all that the loop does, but for evaluation."""
    found = []
    for one, other in itertools.pairwise(steps):
        inside = [stop - start for start, stop in apart if one.finished <= start and stop <= other.started]
        found.append(other.finished - one.finished - sum(inside))
    return found


def _launching(steps: Sequence[SeenStep]) -> list[float]:
    """Seconds after which each call returned, whether the device was done or not."""
    return [step.returned - step.started for step in steps]


def _backlog(steps: Sequence[SeenStep]) -> Iterator[float]:
    """The end waited for and the begin not: what was left of the warm-up is counted, too."""
    for start in range(WARM_UP, len(steps)):
        if steps[start].started < steps[start - 1].finished:
            yield (steps[-1].finished - steps[start].started) / (len(steps) - start)


def _mistakes(seen: Seen) -> Iterator[tuple[str, list[float]]]:
    """What is usually wrong, and the averages that it leads to."""
    number, busy = len(seen.steps), _busy(seen.steps)
    apart = sum(stop - start for start, stop in seen.apart)
    early = [fmean(busy[start:]) for start in range(WARM_UP)]
    yield (
        f"{UNSYNCHRONISED}, which is still at work; torch.cuda.synchronize() before each reading",
        [*_averages(_launching(seen.steps[WARM_UP:])), fmean(_launching(seen.steps)), *_backlog(seen.steps)],
    )
    yield f"the first steps, which compile, are counted; leave out {WARM_UP} or more", early
    if apart:
        late = [(sum(busy[start:]) + apart) / (number - start) for start in range(WARM_UP, number - 1)]
        yield "evaluation or saving is counted as training; stop the clock for it", late
        both = [(sum(busy[start:]) + apart) / (number - start) for start in range(WARM_UP)]
        yield "the first steps, which compile, and evaluation are counted", both
        counted = number + len(seen.apart)
        yield "evaluations are counted as steps", [(sum(busy) + apart) / counted, sum(busy) / counted]


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * abs(other)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
