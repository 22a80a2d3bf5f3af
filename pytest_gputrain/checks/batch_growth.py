"""Does memory grow from step to step? Real steps with batches of one shape, without a limit.

What comes once (optimizer state, caches filled when first used) is over when the looking begins; what is full
some time (a queue of the last features) stops growing while it is watched. Python's garbage is collected
before memory is called grown.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.batch_runs import draw, evaluate, roots_of
from pytest_gputrain.checks.context import CheckContext

WARM_UP = 3
# Every so many steps a loop may do something else (log, keep): of quick steps more are looked at.
WINDOW, QUICK_WINDOW, QUICK_SECONDS = 3, 10, 0.025
# Growth has to go on for so many windows.
WINDOWS = 5
# A number kept from each step is no leak worth a word; nor is what a million steps do not fill memory with.
LEAST_BYTES, STEPS_TO_FILL = 128, 1_000_000


@dataclass(frozen=True)
class Growth:
    """bytes a step, over ``steps`` steps; 0 where memory does not grow. holders: what keeps it, in lines."""

    per_step: int
    steps: int
    holders: tuple[str, ...] = ()


NO_GROWTH = Growth(0, 0)


def watch(case: TrainingCase, ctx: CheckContext, batch_size: int, budget: int, *, evaluating: bool) -> Growth:
    """In a rank: trains a fresh model, evaluating now and then."""
    from pytest_gputrain.checks.session import build_alone, device_of, seed_for, take_step
    from pytest_gputrain.memory.guard import OomGuard

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    least = max(LEAST_BYTES, budget // STEPS_TO_FILL)
    levels: list[int] = []
    with OomGuard(None, device_of(ctx), roots=roots_of(model, optimizer)) as guard:

        def window(size: int, *, collect: bool) -> int:
            """The lowest level that is in use after a step of this window."""
            for _ in range(size):
                step = len(levels)
                take_step(case, model, optimizer, [draw(case, ctx, batch_size, step)], seed_for(ctx, step))
                if collect:
                    gc.collect()
                levels.append(guard.in_use)
            if evaluating:
                evaluate(case, model, draw(case, ctx, batch_size, 0))
            return min(levels[-size:])

        started = time.monotonic()
        window(WARM_UP, collect=False)
        size = QUICK_WINDOW if time.monotonic() - started < WARM_UP * QUICK_SECONDS else WINDOW
        lows = [window(size, collect=False), window(size, collect=False)]
        if lows[1] > lows[0]:
            lows = [window(size, collect=True)]
            while len(lows) < WINDOWS:
                lows.append(window(size, collect=True))
                if lows[-1] <= lows[-2]:
                    return Growth(0, len(levels))
            per_step = (lows[-1] - lows[0]) // (size * (WINDOWS - 1))
            if per_step >= least:
                return Growth(per_step, len(levels), _holders(model, optimizer, size * WINDOWS // 2))
    return Growth(0, len(levels))


def _holders(model: Any, optimizer: Any, at_least: int) -> tuple[str, ...]:
    from pytest_gputrain.checks.batch_holders import piling_up
    from pytest_gputrain.trace.optimizers import optimizers_in

    gc.unfreeze()  # what keeps them may be older than they are
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in known]
    for inner in optimizers_in(optimizer):
        known += [
            value for state in inner.state.values() if isinstance(state, dict) for value in state.values()
        ]
    return tuple(piling_up(known, at_least)[:3])
