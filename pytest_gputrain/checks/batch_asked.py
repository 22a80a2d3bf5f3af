"""A finder is asked, beside a model in training; what it answers, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import gc
import time
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
    beside = {"model": model, "optimizer": optimizer}
    answers = Answers()
    started = time.monotonic()
    try:
        _ask_watched(case, ctx, scene, answers, **beside)
        if scene.global_batch:
            answers.sizes[GLOBAL] = _ask(case, ctx, scene, scene.budget, scene.global_batch, **beside)
    except Exception as error:
        answers.error = describe(error)
        return answers
    answers.seconds = time.monotonic() - started
    answers.swallowed = _with_a_bug(case, ctx, scene, **beside)
    return answers


def _ask_watched(
    case: TrainingCase, ctx: CheckContext, scene: Scene, answers: Answers, *, model: Any, optimizer: Any
) -> None:
    """The first question, with a look at everything before and after."""
    from pytest_gputrain.checks import batch_traces
    from pytest_gputrain.checks.session import device_of, seed_everything, seed_for, take_step
    from pytest_gputrain.memory.guard import OomGuard

    own = _left_by_the_case(case, ctx, scene)
    with OomGuard(None, device_of(ctx), roots=roots_of(model, optimizer)) as guard:
        # Once more, so that what the model keeps beside its parameters has been seen (tables, masks).
        batch = draw(case, ctx, scene.minimum, STEPS_BEFORE)
        take_step(case, model, optimizer, [batch], seed_for(ctx, STEPS_BEFORE))
        del batch
        gc.collect()
        made = guard.made_bytes
        seed_everything(ctx.seed)
        before = batch_traces.read(model, optimizer)
        answers.sizes[PLAIN] = _ask(case, ctx, scene, scene.budget, model=model, optimizer=optimizer)
        answers.left = batch_traces.in_words(before, batch_traces.read(model, optimizer))
        gc.collect()
        answers.leaked = guard.made_bytes - made - own


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


def _left_by_the_case(case: TrainingCase, ctx: CheckContext, scene: Scene) -> int:
    """Bytes that training another model leaves: a step may keep what it saw last (a moving average)."""
    from pytest_gputrain.checks.session import device_of
    from pytest_gputrain.memory.guard import OomGuard

    with OomGuard(None, device_of(ctx)) as guard:
        run(case, ctx, scene.answer, evaluating=scene.evaluates)
        gc.collect()
        return guard.made_bytes
