"""From the records of a run to what its steps did to the weights. Pure, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

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
