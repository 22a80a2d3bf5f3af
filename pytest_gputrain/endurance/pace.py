"""Do steps take longer and longer, and does one rank keep the others waiting? Pure, no torch.

A rank's own time is counted in three parts: for the batch, from the step's begin until its last gradient is
there, and from the optimizer's step to the end. Between the last two ranks wait for each other. A busy
machine is not a slow program: time for which a rank, or a process that makes its batches, was ready to run
and others ran is in no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from pytest_gputrain.endurance.records import StepRecord

ByRank = Mapping[int, Sequence[StepRecord]]
_Part = Callable[[StepRecord], float | None]

SLOWER = 1.7
# Nearer to slower than to as before: with such a rank there is no proof that another alone is slower.
_TOO = (1 + SLOWER) / 2
STRAGGLES = 1.5
LEAST_STEPS = 40
_LEAST_SECONDS = 0.001  # a step: below this the clock and the monitors themselves count
_SURE_SECONDS = 0.005  # what a rank has to be behind by to be called a straggler, and not only noted
_SHARE = 0.8  # of the steps in which it has to be last
_WINDOWS, _WARM_UP = 8, 0.1
_LEAST_LATE_SECONDS = 0.1  # less may be another program that begins, and has the caches
_UNFROZEN = 0.9  # of the parameters that are trained at the end: fewer were another training
_LEAST_LATE = 12  # steps of a last window that says something on its own


@dataclass(frozen=True)
class Drift:
    """Median own seconds of a step, early and late, on the rank where it is worst.

    step: where the late ones begin. ranks: all that get slower, beyond doubt or nearly so.
    """

    early: float
    late: float
    step: int
    ranks: Sequence[int]

    @property
    def ratio(self) -> float:
        return self.late / self.early


@dataclass(frozen=True)
class Straggler:
    """Median own seconds a step of a rank and of the fastest other one; where: in which part, in words.

    share: of the steps from ``step`` on in which it was the last.
    """

    rank: int
    seconds: float
    others: float
    share: float
    step: int
    where: str

    @property
    def is_sure(self) -> bool:
        return self.seconds - self.others >= _SURE_SECONDS


def own_seconds(record: StepRecord) -> float:
    """Of a rank in a step, without waiting for others; where that cannot be told, of its processor."""
    if record.ready_seconds is None:
        return record.load_seconds + record.cpu_seconds
    return record.load_seconds + record.ready_seconds + (record.update_seconds or 0.0)


def without_queues(records: Sequence[StepRecord]) -> list[StepRecord]:
    """With less time for batches, by as much as the processes that make them waited for a processor.

    That is known from one look at them to the next, before a step.
    """
    found: list[StepRecord] = []
    since: list[StepRecord] = []
    for one in records:
        if one.children_queued is not None:
            found += _explained(since, one.children_queued)
            since = []
        since.append(one)
    return found + since


def _explained(records: list[StepRecord], queued: float) -> list[StepRecord]:
    waited = sum(one.load_seconds for one in records)
    if queued <= 0 or waited <= 0:
        return records
    left = 1 - min(1.0, queued / waited)
    return [replace(one, load_seconds=left * one.load_seconds) for one in records]


def drift(by_rank: ByRank) -> Drift | None:
    """Steps that got slower by 1.7 or more and stay so, on the rank where it is worst."""
    by_rank = {rank: without_queues(records) for rank, records in by_rank.items()}
    found = {rank: one for rank, records in by_rank.items() if (one := _drift(rank, records))}
    if not found:
        return None
    worst = max(found.values(), key=lambda one: one.late)
    return replace(worst, ranks=[r for r, those in by_rank.items() if r in found or _too(those, worst)])


def _drift(rank: int, records: Sequence[StepRecord]) -> Drift | None:
    settled = _of_the_same_training(records[round(_WARM_UP * len(records)) :])
    if len(settled) < LEAST_STEPS:
        return None
    own = [own_seconds(one) for one in settled]
    bounds = _bounds(len(own))
    middles = [median(own[a:b]) for a, b in itertools.pairwise(bounds)]
    early, half = max(middles[:2]), len(own) // _WINDOWS // 2
    late = min(middles[-1], median(own[-half:])) if half >= _LEAST_LATE else min(middles[-2:])
    more = _more_data(settled[: bounds[2]], settled[bounds[-2] :])
    slower = late >= SLOWER * max(1.0, more) * early
    if early <= 0 or not slower or late - early < _LEAST_SECONDS or max(middles[:-1]) > 2 * late:
        return None
    change = _change(own, (early + late) / 2)
    if sum(own[change:]) < _LEAST_LATE_SECONDS:
        return None
    return Drift(early, late, settled[change].step, [rank])


def _too(records: Sequence[StepRecord], worst: Drift) -> bool:
    """Does this rank get slower at that step as well, though not beyond doubt?"""
    before = [own_seconds(one) for one in records[round(_WARM_UP * len(records)) :] if one.step < worst.step]
    after = [own_seconds(one) for one in records if one.step >= worst.step]
    return bool(before and after) and median(after) >= _TOO * median(before)


def _bounds(number: int) -> list[int]:
    """Where the windows begin, and the last one's end."""
    return [round(number * window / _WINDOWS) for window in range(_WINDOWS + 1)]


def _change(values: Sequence[float], bound: float) -> int:
    """The first place from which on most are above a bound."""
    score = [1 if value > bound else -1 for value in values]
    best, total, at = 0, 0, len(values) - 1
    for place in range(len(values) - 1, -1, -1):
        total += score[place]
        if total > best:
            best, at = total, place
    return at


def _of_the_same_training(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """The steps since which as many parameters are trained as at the end: those that are unfrozen take their
    own backward and update, and steps before that are no measure for those after it.
    """
    known = [one for one in records if one.updated]
    if len(known) < LEAST_STEPS:
        return records
    updated = [float(one.updated or 0) for one in known]
    bounds = _bounds(len(known))
    middles = [median(updated[a:b]) for a, b in itertools.pairwise(bounds)]
    many = _UNFROZEN * middles[-1]
    last = max((window for window, middle in enumerate(middles) if middle < many), default=None)
    if last is None:
        return records
    begin, end = bounds[last], bounds[last + 2]
    first = known[begin + _change(updated[begin:end], many)].step
    return [one for one in records if one.step >= first]


def _more_data(early: Sequence[StepRecord], late: Sequence[StepRecord]) -> float:
    """How many times as long the late steps may take for their data.

    Twice the samples take twice the time. Twice as long a sample (tokens, pixels, frames) may take four times
    as long, as attention does.
    """
    samples = _ratio(early, late, lambda one: one.samples)
    tokens = _ratio(early, late, lambda one: one.tokens / max(one.samples, 1))
    elements = _ratio(early, late, lambda one: one.elements / max(one.samples, 1))
    return samples * max(1.0, tokens, elements) ** 2


def _ratio(
    early: Sequence[StepRecord], late: Sequence[StepRecord], size: Callable[[StepRecord], float]
) -> float:
    was, now = (median(size(one) for one in records) for records in (early, late))
    return now / was if was and now else 1.0


def straggler(by_rank: ByRank) -> Straggler | None:
    """The rank that the others wait for in most steps, if it is 1.5 times as long at its own work.

    Looked at up to each rank's last gradient, and after the optimizer's step: whoever is late there has made
    the others wait. Where gradients are not seen (sharded parameters), only the end of the step is.
    """
    steps = _common({rank: without_queues(records) for rank, records in by_rank.items()})
    if len(by_rank) < 2 or len(steps) < LEAST_STEPS:
        return None
    parts = (("before its gradients are there", _until_gradients), ("after them", _after_gradients))
    found = [one for where, part in parts if (one := _behind(steps, part, where))]
    return max(found, key=lambda one: one.seconds - one.others, default=None)


def _common(by_rank: ByRank) -> list[dict[int, StepRecord]]:
    """The steps that every rank has, without the first tenth."""
    known = [{one.step: one for one in records} for records in by_rank.values()]
    steps = sorted(set.intersection(*(set(one) for one in known))) if known else []
    settled = steps[round(_WARM_UP * len(steps)) :]
    return [{rank: one[step] for rank, one in zip(by_rank, known, strict=True)} for step in settled]


def _until_gradients(record: StepRecord) -> float | None:
    return None if record.ready_seconds is None else record.load_seconds + record.ready_seconds


def _after_gradients(record: StepRecord) -> float | None:
    return record.update_seconds


def _behind(steps: Sequence[dict[int, StepRecord]], part: _Part, where: str) -> Straggler | None:
    timed = [
        {rank: seconds for rank, one in step.items() if (seconds := part(one)) is not None} for step in steps
    ]
    known = [seconds for seconds, step in zip(timed, steps, strict=True) if len(seconds) == len(step)]
    if len(known) < LEAST_STEPS:
        return None
    middles = {rank: median(seconds[rank] for seconds in known) for rank in known[0]}
    slowest = max(middles, key=lambda rank: middles[rank])
    others = max(middle for rank, middle in middles.items() if rank != slowest)
    whole = median(own_seconds(one) for step in steps for rank, one in step.items() if rank != slowest)
    share = sum(max(one, key=lambda rank: one[rank]) == slowest for one in known) / len(known)
    least = max(_LEAST_SECONDS, (STRAGGLES - 1) * whole)
    if middles[slowest] - others < least or share < _SHARE:
        return None
    return Straggler(slowest, middles[slowest], others, share, next(iter(steps[0].values())).step, where)
