"""Steps that get slower and ranks that are waited for, told from a machine that is busy with others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_gputrain.endurance.pace import drift, straggler
from pytest_gputrain.endurance.records import StepRecord

Seconds = Callable[[int], float]
STEPS = 200


def records(
    own: Seconds, *, update: Seconds = lambda step: 0.002, busy: float = 0.0, tokens: Seconds | None = None
) -> list[StepRecord]:
    """Ranks with this much work of their own; busy: how long others have the processor, at most."""
    noise = random.Random(1)
    return [
        StepRecord(
            step=step,
            loss=1.0,
            seconds=own(step) + update(step) + busy * noise.random(),
            ready_seconds=own(step) * (1 + 0.2 * noise.random()),
            update_seconds=update(step),
            tokens=round(tokens(step)) if tokens else 64,
        )
        for step in range(1, STEPS + 1)
    ]


def steady(step: int) -> float:
    return 0.02


SLOWER: dict[str, Seconds] = {
    "doubles at half time": lambda step: 0.02 * (1 + (step > 100)),
    "doubles at 80 %": lambda step: 0.02 * (1 + (step > 160)),
    "creeps up": lambda step: 0.02 * (1 + step / 60),
}
STEADY: dict[str, Seconds] = {
    "steady": steady,
    "slow at first": lambda step: 0.2 if step < 20 else 0.02,
    "every tenth step is long": lambda step: 0.2 if step % 10 == 0 else 0.02,
    "long for a while": lambda step: 0.06 if 90 < step < 140 else 0.02,
    "cycles": lambda step: 0.02 * (1 + (step // 30) % 2),
    "short": lambda step: 0.0002 * (1 + (step > 100)),
}


@pytest.mark.parametrize("name", SLOWER)
def test_steps_that_get_slower(name: str) -> None:
    found = drift({0: records(SLOWER[name]), 1: records(SLOWER[name], busy=0.2)})
    assert found is not None
    assert found.ranks == [0, 1]
    assert found.ratio > 1.7


@pytest.mark.parametrize("name", STEADY)
def test_steps_that_do_not(name: str) -> None:
    assert drift({0: records(STEADY[name], busy=0.3), 1: records(STEADY[name])}) is None


def test_the_step_and_the_rank_that_got_slower_are_named() -> None:
    found = drift({0: records(steady), 1: records(SLOWER["doubles at half time"])})
    assert found is not None
    assert (found.ranks, found.step) == ([1], 101)


def test_a_rank_that_gets_slower_too_is_no_proof_that_the_other_is_alone() -> None:
    less: Seconds = lambda step: 0.02 * (1 + 0.6 * (step > 100))  # noqa: E731
    found = drift({0: records(less), 1: records(SLOWER["doubles at half time"]), 2: records(steady)})
    assert found is not None
    assert found.ranks == [0, 1]


def test_data_that_a_busy_machine_makes_late_is_no_slow_program() -> None:
    """As far as its workers waited for a processor; what else they take is the program's."""

    def loaded(queued: float) -> list[StepRecord]:
        def one(record: StepRecord) -> StepRecord:
            late = record.step > 100
            look = record.step % 4 == 0
            return replace(
                record,
                load_seconds=0.04 if late else 0.001,
                children_queued=(4 * queued if late else 0.0) if look else None,
            )

        return [one(record) for record in records(steady)]

    assert drift({0: loaded(0.038), 1: loaded(0.2)}) is None
    assert straggler({0: records(steady), 1: loaded(0.038)}) is None
    found = drift({0: loaded(0.0), 1: loaded(0.01)})
    assert found is not None
    assert found.ranks == [0, 1]


@pytest.mark.parametrize(("late", "is_slower"), [(0.0019, False), (0.004, True)])
def test_a_tenth_of_a_second_may_be_another_program_that_begins(late: float, is_slower: bool) -> None:
    own = records(lambda step: late if step > 155 else 0.0005, update=lambda step: 0)
    assert (drift({0: own}) is not None) == is_slower


def test_longer_batches_take_longer() -> None:
    grows: Seconds = lambda step: 1 + (step > 100)  # noqa: E731
    own = [records(lambda step: 0.02 * grows(step), tokens=lambda step: 64 * grows(step))]
    assert drift(dict(enumerate(own))) is None


@pytest.mark.parametrize(("times", "is_slower"), [(6.0, False), (9.0, True)])
def test_larger_samples_may_take_as_long_as_attention_does(times: float, is_slower: bool) -> None:
    """Images or frames that grow: twice as long a sample, four times the time."""
    longer: Seconds = lambda step: 1 + (step > 100)  # noqa: E731
    own = records(lambda step: 0.02 * (times if step > 100 else 1))
    own = [replace(one, samples=8, tokens=8, elements=round(8 * 100 * longer(one.step))) for one in own]
    assert (drift({0: own}) is not None) == is_slower


def unfrozen(seconds: Seconds, updated: Seconds) -> list[StepRecord]:
    return [replace(one, updated=round(updated(one.step))) for one in records(seconds)]


def test_parameters_that_are_unfrozen_take_their_time() -> None:
    """Steps before that are no measure for those after it; from there on steps may not get slower."""
    longer: Seconds = lambda step: 0.06 if step > 90 else 0.02  # noqa: E731
    more: Seconds = lambda step: 52 if step > 90 else 2  # noqa: E731
    assert drift({0: unfrozen(longer, lambda step: 52)}) is not None
    assert drift({0: unfrozen(longer, more)}) is None
    assert drift({0: unfrozen(longer, lambda step: 2 if step % 3 else 52)}) is not None
    found = drift({0: unfrozen(lambda step: longer(step) * (1 + 2 * (step > 150)), more)})
    assert found is not None
    assert found.step == 151


@pytest.mark.parametrize("late", [{"own": lambda step: 0.045}, {"update": lambda step: 0.027}])
def test_a_rank_that_keeps_the_others_waiting(late: dict[str, Seconds]) -> None:
    late = {"own": steady, **late}
    found = straggler({0: records(steady), 1: records(**late), 2: records(steady)})  # type: ignore[arg-type]
    assert found is not None
    assert found.rank == 1
    assert found.is_sure
    assert found.share == 1


def test_ranks_that_are_late_in_turn_do_not() -> None:
    turns = {rank: records(lambda step, rank=rank: 0.06 if step % 2 == rank else 0.02) for rank in (0, 1)}  # type: ignore[misc]
    assert straggler(turns) is None
    assert straggler({0: records(steady), 1: records(lambda step: 0.026)}) is None
    assert straggler({0: records(steady)}) is None
    assert straggler({}) is None
