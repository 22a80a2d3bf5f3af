"""From the records of a run to what its steps did to the weights. Pure, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pytest_gputrain.endurance.falling import LOW_RATE
from pytest_gputrain.endurance.findings import Finding, on, only
from pytest_gputrain.endurance.records import StepRecord
from pytest_gputrain.launch.output import rank_list

ByRank = Mapping[int, Sequence[StepRecord]]

# Steps without an optimizer's at the end of a run, and by how much they are more than ever before.
_FEWEST, _TIMES = 20, 5
_FEWEST_STEPS = 20  # after fewer nothing is said of gradients


def without_effect(by_rank: ByRank) -> Finding | None:
    """Optimizers that step no more, or that only ever saw gradients of 0."""
    return _stopped(by_rank) or _zero(by_rank)


def left_out(by_rank: ByRank) -> tuple[int, str] | None:
    """The first step in which an optimizer stepped on some ranks only; and that in words."""
    took = {
        rank: {one.step: one.update_seconds is not None for one in those} for rank, those in by_rank.items()
    }
    if len(took) < 2 or not all(any(those.values()) for those in took.values()):
        return None
    for step in sorted(set.intersection(*(set(those) for those in took.values()))):
        without = [rank for rank, those in took.items() if not those[step]]
        if 0 < len(without) < len(took):
            others = rank_list([rank for rank in took if rank not in without])
            return step, (
                f"{rank_list(without)} left out the optimizer's step in step {step}, which {others} took: "
                "leave it out on all ranks or on none"
            )
    return None


def _stopped(by_rank: ByRank) -> Finding | None:
    since = {rank: step for rank, those in by_rank.items() if (step := _last(those)) is not None}
    if not since:
        return None
    first, last = min(since.values()), max(those[-1].step for those in by_rank.values() if those)
    message = (
        f"no optimizer steps any more {on([*since], len(by_rank))} from step {first} on, up to step {last}: "
        "losses are finite and nothing is learnt; look at what keeps these steps from it\n"
        "  likely: a loss scale with which gradients overflow in every step, or a condition that became true "
        "for good"
    )
    return Finding("updates", first, only([*since]), message, {"steps": last - first + 1})


def _last(records: Sequence[StepRecord]) -> int | None:
    """The step after the last one with an update, where that is long ago."""
    steps = [one.step for one in records if one.update_seconds is not None]
    if not steps:
        return None
    longest = max((later - earlier for earlier, later in itertools.pairwise(steps)), default=1)
    return steps[-1] + 1 if records[-1].step - steps[-1] >= max(_FEWEST, _TIMES * longest) else None


def _zero(by_rank: ByRank) -> Finding | None:
    looks = [one for those in by_rank.values() for one in those if one.grad_norm is not None]
    steps = sorted({one.step for one in looks})
    if not looks or steps[-1] < _FEWEST_STEPS or any(one.grad_norm or not one.loss for one in looks):
        return None
    named = ", ".join(map(str, steps[:3])) + (", …" if steps[3:] else "")
    message = (
        f"gradients are exactly 0 in every step that was looked at ({named}): nothing of the loss reaches "
        "the weights, which weight decay alone may move; look for detach(), .data, no_grad() or argmax() "
        "between the weights and the loss, and for gradients zeroed before the step"
    )
    return Finding("gradients", steps[0], None, message)


def still(by_rank: ByRank) -> Finding | None:
    """Weights that are the same to the last bit at the run's end as some looks before; to be asked of weights
    that moved earlier.
    """
    since = {rank: step for rank, those in by_rank.items() if (step := _still_since(those)) is not None}
    if not since or len(since) < len(by_rank):
        return None
    first = max(since.values())
    last = max(one.step for those in by_rank.values() for one in those if one.whole_digest is not None)
    message = (
        f"no weight changes any more from step {first} or earlier on, up to step {last}, although optimizers "
        "step and their learning rate is not 0: nothing is learnt; let the optimizer hold the parameters of "
        "the model that is trained\n"
        "  likely: an optimizer or a model that was made anew on the way (a copy, a checkpoint loaded into "
        "new parameters), or updates that rounding takes away (weights in bfloat16)"
    )
    return Finding("updates", first, None, message, {"steps": last - first})


def rate_ended(by_rank: ByRank) -> str:
    """A note on a schedule that came to 0 long before the run's end; "" where none did."""
    since = [
        max((one.step for one in those if one.rate), default=0) + 1
        for those in by_rank.values()
        if any(one.rate for one in those)
    ]
    last = min((those[-1].step for those in by_rank.values() if those), default=0)
    if not since or last - max(since) < _FEWEST:
        return ""
    if not any(one.rate == 0 for those in by_rank.values() for one in those if one.step >= max(since)):
        return ""
    return f"the learning rate is 0 from step {max(since)} on: nothing is learnt from there to step {last}"


def _still_since(records: Sequence[StepRecord]) -> int | None:
    looks = [one for one in records if one.whole_digest is not None]
    if len(looks) < 2:
        return None
    same = [*itertools.takewhile(lambda one: one.whole_digest == looks[-1].whole_digest, reversed(looks))]
    first, last = same[-1].step, looks[-1].step  # a look after which none came proves nothing
    after = [one for one in records if first < one.step <= last and one.update_seconds is not None]
    if len(after) < _FEWEST or not all(one.loss is None or one.loss for one in after):
        return None  # a hinge that is satisfied has nothing more to learn
    # A schedule may be shorter than the run, and a rate that is told by no optimizer may be 0.
    return first if all(one.rate and one.rate >= LOW_RATE for one in after) else None
