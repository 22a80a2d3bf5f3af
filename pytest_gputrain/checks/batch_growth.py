"""Does memory grow from step to step? Real steps with batches of one shape, without a limit.

What comes once (optimizer state, caches filled when first used) is over when the looking begins; what is full
some time (a queue of the last features) or emptied now and then stops growing while it is watched. Python's
garbage is collected before memory is called grown. Counts what steps make: that they come to use more and
more of a data set which was there before is no growth. Does not see memory that is no tensor's, such as the
nodes of a graph whose tensors backward has freed.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_runs import draw, evaluate, roots_of
from pytest_gputrain.checks.context import CheckContext

if TYPE_CHECKING:
    from pytest_gputrain.memory.guard import OomGuard
    from pytest_gputrain.memory.left import Left

WARM_UP = 3
# Every so many steps a loop may do something else (log, keep): of quick steps more are looked at.
LEAST_WINDOW, LARGEST_WINDOW, WINDOW_SECONDS = 3, 25, 0.2
# Growth has to go on for so many windows, which are longer where steps are quick: what is bounded (the last
# hundred losses) is full by then.
WINDOWS, PATIENT_WINDOW = 5, 30
# A number kept from each step is no leak worth a word (CUDA hands out 512 bytes for one); nor is what a
# million steps do not fill memory with.
LEAST_BYTES, STEPS_TO_FILL = {"cpu": 128, "cuda": 4096}, 1_000_000
EVALUATE_EVERY = 5
SHOWN = 3


@dataclass(frozen=True)
class Growth:
    """bytes a step, over ``steps`` steps; 0 where memory does not grow. holders: what keeps it, in lines."""

    per_step: int
    steps: int
    holders: tuple[str, ...] = ()


NO_GROWTH = Growth(0, 0)


def watch(case: TrainingCase, ctx: CheckContext, batch_size: int, budget: int, *, evaluating: bool) -> Growth:
    """In a rank: trains a fresh model, evaluating now and then."""
    training = _Training(case, ctx, batch_size, evaluating)
    with training.guard() as guard:
        window = training.warm_up()
        if training.low(guard, window) >= training.low(guard, window):
            return Growth(0, training.steps)
        guard.note_every_line()
        if window > LEAST_WINDOW:
            window = PATIENT_WINDOW
        lows = [training.low(guard, window, collects=True)]
        while len(lows) < WINDOWS:
            lows.append(training.low(guard, window, collects=True))
            if lows[-1] <= lows[-2]:
                return Growth(0, training.steps)
    per_step = (lows[-1] - lows[0]) // (window * (WINDOWS - 1))
    if per_step < max(LEAST_BYTES[ctx.device], budget // STEPS_TO_FILL):
        return Growth(0, training.steps)
    gc.unfreeze()  # what keeps them may be older than they are
    left = guard.left_in(model=training.model, optimizer=training.optimizer, step=case.step, loss=case.loss)
    return Growth(per_step, training.steps, holders_in(left, at_least=window * WINDOWS // 4))


class _Training:
    """A model that is trained on, and how much of what its steps made is still there."""

    def __init__(self, case: TrainingCase, ctx: CheckContext, batch_size: int, evaluating: bool) -> None:
        from pytest_gputrain.checks.session import build_alone

        self._case, self._ctx, self._batch_size, self._evaluating = case, ctx, batch_size, evaluating
        self.model = build_alone(case, ctx)
        self.optimizer = case.optimizer(self.model)
        self.steps = 0

    def guard(self) -> OomGuard:
        from pytest_gputrain.checks.session import device_of
        from pytest_gputrain.memory.guard import OomGuard

        return OomGuard(None, device_of(self._ctx), roots=roots_of(self.model, self.optimizer))

    def warm_up(self) -> int:
        """Returns how many steps are a window, by the processor's seconds: the machine may be busy."""
        started = time.process_time()
        for _ in range(WARM_UP):
            self._step()
        self._evaluate()
        seconds = max((time.process_time() - started) / WARM_UP, 1e-6)
        return max(LEAST_WINDOW, min(LARGEST_WINDOW, int(WINDOW_SECONDS / seconds)))

    def low(self, guard: OomGuard, window: int, *, collects: bool = False) -> int:
        """The lowest level, in bytes, that is in use after a step of this window."""
        levels = []
        for step in range(window):
            self._step()
            if collects:
                gc.collect()
            levels.append(guard.made_bytes)
            if step % EVALUATE_EVERY == EVALUATE_EVERY - 1 or step == window - 1:
                self._evaluate()
        return min(levels)

    def _step(self) -> None:
        from pytest_gputrain.checks.session import seed_for, take_step

        batch = draw(self._case, self._ctx, self._batch_size, self.steps)
        take_step(self._case, self.model, self.optimizer, [batch], seed_for(self._ctx, self.steps))
        self.steps += 1

    def _evaluate(self) -> None:
        if self._evaluating:
            evaluate(self._case, self.model, draw(self._case, self._ctx, self._batch_size, 0))


def holders_in(left: Sequence[Left], at_least: int) -> tuple[str, ...]:
    """A line for each variable that keeps tensors: of those that keep many, else what is largest.

    at_least: how many tensors of one shape, from one line, are a pile.
    """
    lines: dict[str, str] = {}
    for found in [one for one in left if one.count >= at_least] or left:
        lines.setdefault(re.sub(r"\[.*?\]", "[]", found.held_by), str(found))
    named = [line for holder, line in lines.items() if not holder.startswith("no Python variable")]
    return tuple((named or [*lines.values()])[:SHOWN])
