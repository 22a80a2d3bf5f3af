"""A finder is asked, beside a model in training; what it answers, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.batch_finders import ask
from pytest_gputrain.checks.batch_runs import draw, quick_collection, roots_of, run
from pytest_gputrain.checks.batch_scene import Scene
from pytest_gputrain.checks.context import CheckContext

PLAIN, GLOBAL = "plain", "global batch"
# Of the model that is being trained: it has gradients, optimizer state and moved buffers then.
STEPS_BEFORE = 2


@dataclass
class Answers:
    """sizes: by question; error: what the finder raised instead of an answer.

    left: in words, what is not as before; leaked: bytes still in use, beyond what the case keeps by itself.
    swallowed: the size that a finder gave though every step raised a TypeError, None where it raised that.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    error: str = ""
    left: str = ""
    leaked: int = 0
    swallowed: int | None = None
    seconds: float = 0.0


class Bug:
    """In the place of the case's step and loss. called: whether the finder came to it at all."""

    def __init__(self) -> None:
        self.called = False

    def __call__(self, *args: Any) -> Any:
        self.called = True
        raise TypeError("a bug in the training step, planted by batch_size_found")


def ask_all(case: TrainingCase, ctx: CheckContext, scene: Scene) -> Answers:
    """In the rank: all questions, and between them a look at what has changed."""
    from pytest_gputrain.checks.session import build_alone, seed_for, take_step

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    for step in range(STEPS_BEFORE):
        take_step(case, model, optimizer, [draw(case, ctx, scene.minimum, step)], seed_for(ctx, step))
    with quick_collection():
        return _ask_beside(case, ctx, scene, model, optimizer)


def _ask_beside(case: TrainingCase, ctx: CheckContext, scene: Scene, model: Any, optimizer: Any) -> Answers:
    from pytest_gputrain.checks import batch_traces
    from pytest_gputrain.checks.session import seed_everything

    beside = {"model": model, "optimizer": optimizer}
    answers = Answers()
    own = _left_by_the_case(case, ctx, scene)
    seed_everything(ctx.seed)
    before = batch_traces.read(model, optimizer)
    started = time.monotonic()
    try:
        with _watched(model, optimizer, ctx, answers):
            answers.sizes[PLAIN] = _ask(case, ctx, scene, scene.budget, **beside)
        answers.leaked -= own
        answers.left = batch_traces.in_words(before, batch_traces.read(model, optimizer))
        if scene.global_batch:
            answers.sizes[GLOBAL] = _ask(case, ctx, scene, scene.budget, scene.global_batch, **beside)
    except Exception as error:
        answers.error = describe(error)
        return answers
    answers.seconds = time.monotonic() - started
    answers.swallowed = _with_a_bug(case, ctx, scene, **beside)
    return answers


def _ask(
    case: TrainingCase,
    ctx: CheckContext,
    scene: Scene,
    capacity: int,
    global_batch: int | None = None,
    **beside: Any,
) -> int:
    return ask(
        ctx.finder,
        case,
        **beside,
        device=ctx.device,
        capacity=capacity,
        min_batch_size=scene.minimum,
        max_batch_size=scene.maximum,
        global_batch_size=global_batch,
        evaluates=scene.evaluates,
    )


def _with_a_bug(case: TrainingCase, ctx: CheckContext, scene: Scene, **beside: Any) -> int | None:
    """What a finder makes of a step that raises a TypeError, None where it raises, as it should."""
    bug = Bug()
    broken = dataclasses.replace(case, step=bug, loss=bug, name=f"{case.name}, with a bug")
    try:
        size = _ask(broken, ctx, scene, scene.budget, **beside)
    except Exception:
        return None
    return size if bug.called else None


@contextlib.contextmanager
def _watched(model: Any, optimizer: Any, ctx: CheckContext, answers: Answers) -> Iterator[None]:
    """How much more is in use after than before."""
    from pytest_gputrain.checks.session import device_of
    from pytest_gputrain.memory.guard import OomGuard

    with OomGuard(None, device_of(ctx), roots=roots_of(model, optimizer)) as guard:
        before = guard.in_use
        yield
        gc.collect()
        answers.leaked = guard.in_use - before


def _left_by_the_case(case: TrainingCase, ctx: CheckContext, scene: Scene) -> int:
    """Bytes that training another model leaves: a step may keep what it saw last (a moving average)."""
    from pytest_gputrain.checks.session import device_of
    from pytest_gputrain.memory.guard import OomGuard

    with OomGuard(None, device_of(ctx)) as guard:
        run(case, ctx, scene.answer, evaluating=scene.evaluates)
        gc.collect()
        return guard.in_use
