"""Training as a loop does it, at the batch size found, under the memory that there is.

More steps than a finder tries, evaluation in between, the case's own stream with its longest and its last
batch, and steps that accumulate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_runs import draw, evaluate, num_bytes, part_of, raise_swallowed, roots_of
from pytest_gputrain.checks.batch_scene import Scene
from pytest_gputrain.checks.batch_stream import chosen, shapes
from pytest_gputrain.checks.batch_verdict import WHY_ACCUMULATING, WHY_TOO_LARGE
from pytest_gputrain.checks.context import CheckContext

STEPS, EVALUATE_EVERY = 10, 4
# Of quick steps more: an average of the weights, a second optimizer may begin after a warm-up. By the
# processor's seconds, as the machine may be busy, and as many as there is room for their batches, which are
# drawn before: parts of the budget.
QUICK_STEPS, QUICK_SECONDS = 40, 5.0
QUICK_BATCHES = {"cpu": 1.0, "cuda": 0.05}
# What a finder may be expected to have tried itself, two steps and evaluation.
TRIED = 3
ACCUMULATING_STEPS = 2


@dataclass(frozen=True)
class Piece:
    """Micro-batches of a step, or a batch to evaluate; words: what they are; likely: why they do not fit.

    if_quick: left out where the steps before have taken long.
    """

    micro_batches: list[Any]
    words: str
    likely: str
    is_evaluation: bool = False
    if_quick: bool = False


@dataclass(frozen=True)
class Held:
    """steps taken; ran_out: in words what did not fit, "" if all did. peak: bytes."""

    steps: int
    peak: int
    ran_out: str = ""
    details: str = ""
    likely: str = ""


_LATER = (
    "something comes later than in the steps that the finder tries: a copy of the weights, an optimizer's "
    "state, a "
    "cache; do it from the first step on, or let the finder take more steps"
)
_LONGER = (
    "batch() gives shorter samples than the data has; let it give the longest that can come, or cut the data"
)


_UPDATE = ", in the optimizer's update"


def plan(case: TrainingCase, ctx: CheckContext, size: int, scene: Scene) -> Iterator[Piece]:
    """Training at one size, then on the case's own data."""
    yield from steps(case, ctx, size, scene)
    yield from _later(case, ctx, size, scene)
    usual = shapes(draw(case, ctx, size, 0))
    for taken in chosen(case, ctx, size):
        words = f"batch {taken.index} of batches(): {shapes(taken.batch)}, where batch() gives {usual}"
        yield Piece([taken.batch], words, _LONGER)


def _later(case: TrainingCase, ctx: CheckContext, size: int, scene: Scene) -> Iterator[Piece]:
    """Steps on, as many as there is room for their batches."""
    each = max(num_bytes(draw(case, ctx, size, STEPS)), 1)
    room = int(QUICK_BATCHES[ctx.device] * scene.budget / each)
    for step in range(STEPS, min(QUICK_STEPS, STEPS + room)):
        yield Piece([draw(case, ctx, size, step)], f"step {step}", _LATER, if_quick=True)


def steps(
    case: TrainingCase, ctx: CheckContext, size: int, scene: Scene, number: int = STEPS
) -> Iterator[Piece]:
    """Steps and evaluation at one size, as many on every rank."""
    for step in range(number):
        yield Piece([draw(case, ctx, size, step)], f"step {step}", _LATER)
        if scene.evaluates and step % EVALUATE_EVERY == 1:
            yield Piece(
                [draw(case, ctx, size, step)],
                f"evaluation after step {step}",
                WHY_TOO_LARGE["evaluation"],
                True,
            )
    yield Piece([draw(case, ctx, max(scene.minimum, size // 2), 0)], "a short batch", _LATER)


def accumulating(case: TrainingCase, ctx: CheckContext, size: int, number: int) -> Iterator[Piece]:
    """Steps of a number of micro-batches."""
    for step in range(ACCUMULATING_STEPS):
        batch = draw(case, ctx, size, step)
        yield Piece([batch] * number, f"step {step} over {number} micro-batches", WHY_ACCUMULATING)


def train(case: TrainingCase, ctx: CheckContext, pieces: list[Piece], limit: int) -> Held:
    """A fresh model through all pieces, which are used up. Raises what is no out-of-memory."""
    from pytest_gputrain.checks.session import build_alone, device_of, seed_for, take_step
    from pytest_gputrain.memory.guard import OomGuard
    from pytest_gputrain.memory.oom import is_oom

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    evaluated, began = False, time.process_time()
    guard, done = OomGuard(limit, device_of(ctx), roots=roots_of(model, optimizer)), 0
    try:
        with guard:
            while pieces:
                piece = pieces.pop(0)
                if piece.if_quick and time.process_time() - began > QUICK_SECONDS:
                    continue
                if piece.is_evaluation:
                    evaluate(case, model, piece.micro_batches[0])
                else:
                    take_step(case, model, optimizer, piece.micro_batches, seed_for(ctx, done))
                raise_swallowed(guard)
                evaluated = evaluated or piece.is_evaluation
                done += 1
    except Exception as error:
        if not is_oom(error):
            raise
        part = part_of(error, done)
        words = f"{piece.words}{_UPDATE if part == 'optimizer' else ''}"
        likely = WHY_TOO_LARGE[part] if done < TRIED and not piece.is_evaluation else piece.likely
        if piece.is_evaluation and evaluated:  # the same fitted before
            likely = _LATER
        return Held(done, guard.peak_bytes, words, f"{guard.oom}", likely)
    return Held(done, guard.peak_bytes)
