"""Whether a branch that ended well ran what was planned: its rate, its batch, its steps, its tokens. Pure.

A sweep that compares other runs than it names is worse than one that failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.sweep.metrics import Reported

NEAR = 1e-3
"""Rates this near to each other are one: scripts print three digits."""


@dataclass(frozen=True)
class Observed:
    """What the rank's optimizers really did, traced. rates: the highest of each group; empty: none seen.

    most_steps: of any optimizer, where they step unequally often.
    """

    steps: int | None
    rates: tuple[float, ...]
    most_steps: int = 0


@dataclass(frozen=True)
class Rate:
    """Of another branch: the rate it was planned with and the highest that it stepped with."""

    k: int
    planned: float
    highest: float


def observed_of(optimizers: Iterable[Mapping[str, Any]]) -> Observed:
    """``optimizers``: what ``trace.rates`` wrote.

    The one that stepped last counts, and those that stepped as often: a search for the batch size steps
    optimizers of its own, before.
    """
    seen = sorted(optimizers, key=lambda one: int(one["last_at"]))
    if not seen:
        return Observed(None, ())
    steps = int(seen[-1]["steps"])
    trained = [one for one in seen if int(one["steps"]) == steps]
    rates = tuple(float(group["highest"]) for one in trained for group in one["groups"])
    return Observed(steps, rates, max(int(one["steps"]) for one in seen))


def rates_of(observed: Observed, reported: Reported) -> tuple[float, ...]:
    """The highest rates, observed ones before what the script says."""
    return observed.rates or ((reported.highest_rate,) if reported.highest_rate is not None else ())


def wrong(
    values: Mapping[str, Any],
    observed: Observed,
    reported: Reported,
    checkpoint_rates: Sequence[float],
    others: Sequence[Rate],
) -> str | None:
    """The first thing in which the run was not the branch, one line; None where nothing speaks against it.

    values: of the configuration. others: branches of the sweep that have ended well.
    """
    return (
        _wrong_rate(values, rates_of(observed, reported), checkpoint_rates, others)
        or _too_many_steps(values, observed)
        or _wrong_batch(values, reported)
        or _wrong_tokens(values, reported)
        or _too_few_steps(values, observed, reported)
    )


def notes(values: Mapping[str, Any], observed: Observed, reported: Reported) -> list[str]:
    """What could not be checked, or is unusual and may be meant."""
    found, planned, rates = [], values["learning_rate"], rates_of(observed, reported)
    if reported.final_loss is None:
        found.append("the script reports no loss")
    elif not math.isfinite(reported.final_loss):
        found.append(f"the final loss is {reported.final_loss}")
    if reported.tokens is None:
        found.append("the script reports no tokens, so its budget is not checked")
    if not rates:
        found.append("no optimizer of torch's was seen and no rate reported, so the rate is not checked")
    elif not any(_same(rate, planned) for rate in rates):
        found.append(f"the highest rate was {max(rates):.6g}, planned is {planned:.6g}")
    if observed.steps is not None and observed.steps < values["num_steps"]:
        found.append(f"{observed.steps} optimizer steps, planned are {values['num_steps']}")
    return found


def never_read(checkpoint: str) -> str:
    """Of a branch whose script did not open the checkpoint: it may be read by other means than Python's."""
    return f"{checkpoint} was not opened by the script, as far as Python tells: does it start from there?"


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= NEAR * max(abs(one), abs(other))


def _wrong_rate(
    values: Mapping[str, Any], rates: Sequence[float], checkpoint: Sequence[float], others: Sequence[Rate]
) -> str | None:
    planned = values["learning_rate"]
    if not rates or any(_same(rate, planned) for rate in rates):
        return None
    if all(any(_same(rate, one) for one in checkpoint) for rate in rates):
        return (
            f"rate overwritten by the checkpoint: it trained at {max(rates):.6g}, which is the "
            f"checkpoint's, and not at the planned {planned:.6g}; set group['lr'] after "
            "optimizer.load_state_dict, and what a scheduler starts from (initial_lr) too"
        )
    for other in others:
        if not _same(other.planned, planned) and _same(other.highest, max(rates)):
            return (
                f"rate does not follow the plan: it trained at {max(rates):.6g} as k={other.k} did, planned "
                f"are {planned:.6g} and {other.planned:.6g}; take learning_rate from the configuration"
            )
    return None


def _too_many_steps(values: Mapping[str, Any], observed: Observed) -> str | None:
    planned = values["num_steps"]
    if observed.steps is None or observed.steps <= planned:
        return None
    micro = (planned - 1) * values["accumulation_steps"] + values["last_step_accumulation_steps"]
    why = "one per micro-batch, so the batch was not accumulated" if observed.steps == micro else "too many"
    return f"{observed.steps} optimizer steps, planned are {planned}: {why}"


def _too_few_steps(values: Mapping[str, Any], observed: Observed, reported: Reported) -> str | None:
    """All tokens in half of the steps: a batch of twice the target, or more.

    Where fewer are missing it is a note: a GradScaler skips some. Of 3 steps, one must not be too many.
    """
    planned, tokens = values["num_steps"], values["tokens"]
    if observed.steps is None or reported.tokens != tokens:  # it may have ended early
        return None
    steps = max(observed.steps, observed.most_steps)
    if 2 * steps > planned + (planned > 3):  # an odd number at twice the batch is one more than half
        return None
    return (
        f"{steps} optimizer steps for all {tokens:,} tokens, planned are {planned}: too few, so the batch "
        "was larger than the target, or steps were skipped"
    )


def _wrong_batch(values: Mapping[str, Any], reported: Reported) -> str | None:
    planned = values["total_batch_size"]
    if reported.total_batch_size in (None, planned):
        return None
    return f"effective batch is {reported.total_batch_size} sequences a step, planned are {planned}"


def _wrong_tokens(values: Mapping[str, Any], reported: Reported) -> str | None:
    planned = values["tokens"]
    if reported.tokens is None or reported.tokens == planned:
        return None
    what = "token overshoot" if reported.tokens > planned else "too few tokens"
    left = values["last_step_sequences"]
    return (
        f"{what}: it saw {reported.tokens:,}, every branch has to see {planned:,} "
        f"({values['num_steps']} steps, the last of {left} sequences)"
    )
