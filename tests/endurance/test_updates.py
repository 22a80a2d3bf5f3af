"""Steps in which no optimizer took part, on all ranks or on one, and gradients of 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.endurance.updates import left_out, rate_ended, still, without_effect

STEPS = 120


def records(
    steps: Callable[[int], bool], *, norm: float = 1.0, loss: float = 2.0, every: int = 50
) -> list[StepRecord]:
    return [
        StepRecord(
            step=step,
            loss=loss,
            seconds=0.1,
            update_seconds=0.01 if steps(step) else None,
            grad_norm=norm if step % every == 0 else None,
        )
        for step in range(1, STEPS + 1)
    ]


def always(step: int) -> bool:
    return True


def test_an_optimizer_that_steps_no_more() -> None:
    found = without_effect({0: records(lambda step: step < 90), 1: records(lambda step: step < 80)})
    assert found is not None
    assert (found.kind, found.step, found.rank) == ("updates", 80, None)
    assert found.message.splitlines()[0] == (
        "no optimizer steps any more on every rank from step 80 on, up to step 120: losses are finite and "
        "nothing is learnt; look at what keeps these steps from it"
    )


def test_steps_without_an_optimizers_now_and_then_are_well() -> None:
    for steps in (always, lambda step: step % 16 == 0, lambda step: step % 60 > 10, lambda step: False):
        assert without_effect({0: records(steps), 1: records(steps)}) is None


def test_gradients_of_0() -> None:
    found = without_effect({0: records(always, norm=0.0, every=30)})
    assert found is not None
    assert found.message.startswith(
        "gradients are exactly 0 in every step that was looked at (30, 60, 90, …): nothing of the loss "
        "reaches the weights"
    )
    assert without_effect({0: records(always, norm=0.0), 1: records(always)}) is None
    assert without_effect({0: records(always, norm=0.0, loss=0.0)}) is None  # a hinge that is satisfied
    assert without_effect({0: records(always, every=1000)}) is None


def test_a_step_that_one_rank_left_out() -> None:
    skips = records(lambda step: step not in (64, 90))
    assert left_out({0: records(always), 1: skips[:80]}) == (
        64,
        "rank 1 left out the optimizer's step in step 64, which rank 0 took: leave it out on all ranks or on "
        "none",
    )
    assert left_out({0: records(always), 1: records(always)}) is None
    assert left_out({0: skips, 1: skips}) is None
    assert left_out({0: records(always), 1: records(lambda step: False)}) is None
    assert left_out({0: skips}) is None


def looked_at(
    digest: Callable[[int], str], *, rate: float | None = 1e-3, loss: float = 2.0
) -> list[StepRecord]:
    """Every element is looked at in every 30th step."""
    return [
        replace(one, rate=rate, loss=loss, whole_digest=None if one.step % 30 else digest(one.step))
        for one in records(always)
    ]


def stops(step: int) -> str:
    return str(min(step, 60))


def test_weights_that_change_no_more_although_optimizers_step() -> None:
    found = still({0: looked_at(stops), 1: looked_at(stops)})
    assert found is not None
    assert (found.kind, found.step, found.rank) == ("updates", 60, None)
    assert found.message.splitlines()[0] == (
        "no weight changes any more from step 60 or earlier on, up to step 120, although optimizers step and "
        "their learning rate is not 0: nothing is learnt; let the optimizer hold the parameters of the model "
        "that is trained"
    )


def test_weights_that_have_reason_not_to_change() -> None:
    assert still({0: looked_at(str), 1: looked_at(stops)}) is None
    assert still({0: looked_at(str)}) is None
    for num_steps in range(61, 120):  # ended before the next look, as where its time is up
        assert still({0: looked_at(str)[:num_steps], 1: looked_at(str)[:num_steps]}) is None
    assert still({0: looked_at(stops, rate=0.0)}) is None  # a schedule that has ended
    assert still({0: looked_at(stops, rate=1e-9)}) is None
    assert still({0: looked_at(stops, rate=None)}) is None
    assert still({0: looked_at(stops, loss=0.0)}) is None  # a hinge that is satisfied
    assert still({0: looked_at(stops)[:61]}) is None
    assert still({0: []}) is None


def test_a_rate_that_came_to_0_is_worth_a_note() -> None:
    def ends(at: int) -> list[StepRecord]:
        return [replace(one, rate=1e-3 if one.step < at else 0.0) for one in records(always)]

    said = "the learning rate is 0 from step 60 on: nothing is learnt from there to step 120"
    assert rate_ended({0: ends(60), 1: ends(60)}) == said
    for well in (ends(115), ends(999), ends(0), records(always)):
        assert rate_ended({0: well}) == ""
    assert rate_ended({}) == ""
